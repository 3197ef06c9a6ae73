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
from onelayer.compiler.storage.model_config import is_diffusers_config, read_model_config
from onelayer.compiler.storage.pipeline_directory import (
    ENCODED_FILE,
    components_of,
    denoiser_directory,
    is_pipeline,
    read_pipeline_index,
)


def inspect_path(path: str | Path, plot: str | Path | None = None) -> dict[str, Any]:
    """Describe `path` in plain JSON values; `kind` says what it is.

    An emulator is drawn into `plot`, if given. Raises `InputError` if the path is nothing that onelayer reads.
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
    if is_pipeline(directory):
        return {"kind": "pipeline", **facts, **_pipeline(directory)}
    if (directory / ENCODED_FILE).is_file():
        return {"kind": "encoded", **facts, **_encoded(directory)}
    if (directory / "config.json").is_file():
        return {"kind": "checkpoint", **facts, **_checkpoint(directory)}
    raise InputError(f"{path}: holds no config.json, adapter_config.json or artifact.json; give another directory")


def _pipeline(directory: Path) -> dict[str, Any]:
    """Describe a pipeline: the classes and bytes of its components, and its denoiser as a checkpoint."""
    denoiser = denoiser_directory(directory)
    index = read_pipeline_index(directory)
    components = {
        name: {"class": class_name, "bytes": directory_bytes(directory / name)}
        for name, (_, class_name) in components_of(index).items()
        if (directory / name).is_dir()
    }
    described = {"denoiser": denoiser.name, "components": components}
    return {"class": index["_class_name"], **described, **_checkpoint(denoiser)}


def _encoded(directory: Path) -> dict[str, Any]:
    """Describe encoded images: what they were encoded for, and their captions."""
    from onelayer.compiler.denoising.encoded import EncodedImages

    images = EncodedImages.open(directory)
    return {
        "digest": images.digest,
        "base": dict(images.base),
        "scheduler": images.scheduler["class_name"],
        "images": len(images.numbers(is_class=False)),
        "class_images": len(images.numbers(is_class=True)),
        "captions": list(dict.fromkeys(row.caption for row in images.rows)),
    }


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
        "architectures": [config["_class_name"]] if is_diffusers_config(config) else config.get("architectures"),
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
