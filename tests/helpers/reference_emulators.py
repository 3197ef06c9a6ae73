"""A reference writer of emulators, for tests: plain SVD of a resident model's weights, in the published format."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny_models import save_tiny
from onelayer.compiler.emulators.directory import SHIM_FILE, SHIM_TEXT, auto_map
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.quantize import quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.storage.checkpoint import model_digest

# How factors can be stored; None means plain tensors.
FACTOR_DTYPES: tuple[FactorDtype | None, ...] = (None, "bf16", "int8", "nf4")
_STORED: ContextVar[FactorDtype | None] = ContextVar("factor_dtype", default=None)


@contextmanager
def stored_as(factor_dtype: FactorDtype | None) -> Iterator[None]:
    """Give emulators written in the block quantized factors, and every third weight quantized whole."""
    token = _STORED.set(factor_dtype)
    try:
        yield
    finally:
        _STORED.reset(token)


def products(directory: Path) -> dict[str, torch.Tensor]:
    """Form an emulator's weights (out, in) in full, by module."""
    emulator = Emulator.open(directory)
    pairs = {name: emulator.factors(name) for name in emulator.facts.compressed}
    return {name: up if down is None else up @ down for name, (up, down) in pairs.items()}


def dense_reference(model: Any, directory: Path) -> Any:
    """Change `model` in place to have an emulator's weights."""
    for name, product in products(directory).items():
        module = model.get_submodule(name)
        module.weight.data = (product.T if isinstance(module, Conv1D) else product).to(module.weight).contiguous()
    return model


def rank_for(out_features: int, in_features: int, ratio: float) -> int:
    """Compute the rank that keeps `ratio` of a linear's parameters; 1.0 means full rank, an exact emulator."""
    full = min(out_features, in_features)
    return full if ratio >= 1.0 else max(1, int(ratio * in_features * out_features / (in_features + out_features)))


def svd_factors(weight_oi: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lr_up` (out, k) and `lr_down` (k, in) of the best rank-k approximation in the plain Frobenius norm."""
    up, singular, down = torch.linalg.svd(weight_oi.double(), full_matrices=False)
    return (up[:, :rank] * singular[:rank]).to(weight_oi.dtype), down[:rank].to(weight_oi.dtype)


def compressible(model: Any, skip: tuple[str, ...] = ()) -> dict[str, nn.Linear | Conv1D]:
    """List every linear except the output head and those whose name contains a fragment of `skip`."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not any(part in name for part in skip)
    }


def write_emulator(
    model: Any,
    original: str | Path,
    output: str | Path,
    ratio: float = 1.0,
    skip: tuple[str, ...] = (),
    base_model: str = "example/original",
    base_revision: str | None = None,
) -> Path:
    """Write an emulator of `model`, which was saved in `original`; tokenizer files are taken from there."""
    directory = Path(output)
    directory.mkdir(parents=True)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for alias in model.all_tied_weights_keys:
        tensors.pop(alias, None)
    ranks, shapes, factor_dtype = {}, {}, _STORED.get()
    for number, (name, module) in enumerate(compressible(model, skip).items()):
        stored = tensors.pop(f"{name}.weight")
        weight_oi = stored.T if isinstance(module, Conv1D) else stored
        shapes[name] = (weight_oi.shape[0], weight_oi.shape[1])
        if factor_dtype is not None and number % 3 == 2:
            tensors[f"{name}.lr_dense"] = quantize_matrix(weight_oi, factor_dtype)
            continue
        ranks[name] = rank_for(*shapes[name], ratio)
        up, down = svd_factors(weight_oi, ranks[name])
        if factor_dtype is not None:
            up, down = quantize_matrix(up.T, factor_dtype), quantize_matrix(down, factor_dtype)
        tensors[f"{name}.lr_up"], tensors[f"{name}.lr_down"] = up.contiguous(), down.contiguous()
    _write_shards(tensors, directory)
    dtype = str(model.dtype).removeprefix("torch.")
    quantized = {"unpacked_dtype": dtype, "shapes": shapes, "quantized_dense": sorted(shapes.keys() - ranks.keys())}
    stored_fields = {
        "ranks": ranks,
        "factor_dtype": factor_dtype or dtype,
        **(quantized if factor_dtype is not None else {}),
    }
    _write_config(model, Path(original), directory, stored_fields, base_model, base_revision)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json"):
        for file in Path(original).glob(pattern):
            shutil.copy(file, directory)
    (directory / SHIM_FILE).write_text(SHIM_TEXT)
    return directory


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write two shards and their index, under names that transformers does not look for."""
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"emulator-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "emulator.safetensors.index.json").write_text(json.dumps(index))


def _write_config(
    model: Any, original: Path, directory: Path, stored: dict[str, Any], base_model: str, base_revision: str | None
) -> None:
    document = json.loads((original / "config.json").read_text())
    document["auto_map"] = auto_map(model.config)
    document["quantization_config"] = {
        "quant_method": "onelayer",
        "format_version": 1,
        **stored,
        "base_model": base_model,
        "base_revision": base_revision,
        "base_digest": model_digest(original),
        "weights_file": "emulator.safetensors.index.json",
    }
    (directory / "config.json").write_text(json.dumps(document, indent=2))


def emulator_and_texts(root: Path, texts: Sequence[str]) -> Path:
    """Make `original`, an emulator of it and `text.jsonl`, a row for each of `texts`, in `root`; return `root`."""
    model = save_tiny("llama", root / "original")
    write_emulator(model, root / "original", root / "emulator", ratio=0.5)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"{text} " * 3}) + "\n" for text in texts))
    return root
