"""A path in, a description out: of an emulator, an adapter, an artifact or a checkpoint."""

from pathlib import Path
from typing import Any

from onelayer.compiler.adapters.config import read_config
from onelayer.compiler.adapters.reader import adapter_digest, read_provenance
from onelayer.compiler.dequantize.formats import quantization_method, quantization_settings
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.processors import media_read
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import check_directory, directory_bytes, read_json
from onelayer.compiler.storage.gguf_directory import gguf_directory, is_gguf
from onelayer.compiler.storage.model_config import read_model_config


def inspect_path(path: str | Path, plot: str | Path | None = None) -> dict[str, Any]:
    """Describe `path` in plain JSON values; `kind` says which of the four it is.

    An emulator is drawn into `plot`, if given. Raises `InputError` if the path is none of the four.
    """
    if plot is not None:
        from onelayer.compiler.emulators.plot import plot_emulator

        plot_emulator(path, plot)
    directory = gguf_directory(Path(path)) if is_gguf(Path(path)) else Path(path)
    check_directory(directory, "give an emulator, an adapter, an artifact or a model directory")
    facts = {"path": str(directory), "bytes": directory_bytes(directory)}
    if (directory / "artifact.json").is_file():
        return {"kind": "artifact", **facts, **read_json(directory / "artifact.json")}
    if (directory / "adapter_config.json").is_file():
        return {"kind": "adapter", **facts, **_adapter(directory)}
    if (directory / "emulator.json").is_file():
        emulator = Emulator.open(directory)
        record = read_json(directory / "emulator.json")
        return {"kind": "emulator", **facts, **record, "digest": emulator.digest, "reads": _reads(directory)}
    if (directory / "config.json").is_file():
        return {"kind": "checkpoint", **facts, **_checkpoint(directory)}
    raise InputError(f"{path}: holds no config.json, adapter_config.json or artifact.json; give another directory")


def _adapter(directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    return {
        "digest": adapter_digest(directory),
        "base_model": config.base_model_name_or_path,
        "rank": config.r,
        "lora_alpha": config.lora_alpha,
        "provenance": read_provenance(directory),
    }


def _checkpoint(directory: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(directory)
    config = read_model_config(directory)
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.size_bytes
    return {
        "digest": model_digest(directory),
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "reads": _reads(directory),
        "quantization": _quantization(checkpoint, config),
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "bytes_by_dtype": dtypes,
    }


def _reads(directory: Path) -> list[str]:
    """List what the rows of a model may hold: text with a tokenizer, images and audio with a processor for them."""
    has_tokenizer = any(directory.glob("tokenizer*")) or any(directory.glob("vocab*"))
    return [*(["text"] if has_tokenizer else []), *media_read(directory)]


def _quantization(checkpoint: Checkpoint, config: dict[str, Any]) -> str | None:
    settings = quantization_settings(config)
    return "gguf" if checkpoint.is_gguf else None if settings is None else quantization_method(settings)
