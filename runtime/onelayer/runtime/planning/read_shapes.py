"""Reads the shapes of a model's weights from headers alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onelayer.compiler.dequantize.checkpoint import unpacked
from onelayer.compiler.dequantize.formats import format_of, quantization_settings
from onelayer.compiler.dequantize.packed import GGUF_SCRATCH_VALUE_BYTES, GGUF_TABLES, PackedFormat, unpacking_bytes
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.unit_memory import EXPERTS_PER_TOKEN_NAMES
from onelayer.compiler.storage.checkpoint import INDEX_FILES, SINGLE_FILES, Checkpoint, floating_bytes
from onelayer.compiler.storage.gguf_format import SUFFIX
from onelayer.compiler.storage.model_config import CONFIG_FILE, read_model_config
from onelayer.compiler.storage.safetensors_format import DTYPE_BITS
from onelayer.runtime.planning.shapes import BlockShape, ExpertShapes, LinearShape, ModelShapes


def read_shapes(directory: Path) -> ModelShapes:
    """Read shapes from headers if there are weights (without torch), else from the config.

    Raises `InputError` if the directory holds no model that can be streamed.
    """
    named = any((directory / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))
    if named or next(directory.glob(f"*{SUFFIX}"), None):
        return shapes_from_headers(directory)
    return _shapes_from_config(directory)


def _shapes_from_config(directory: Path) -> ModelShapes:
    document = read_model_config(directory)
    import torch

    from onelayer.compiler.libraries import transformers_models

    config = transformers_models.read_config(directory)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = transformers_models.empty_model(config, transformers_models.model_class(config, directory), dtype)
    # Tied parameters are one object here, so they are listed once.
    table = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # The class knows the defaults of fields that the file omits.
    named = {"hidden_size", "vocab_size", "num_experts_per_tok"}
    text = config.get_text_config()
    known = {name: getattr(text, name) for name in named if isinstance(getattr(text, name, None), int)}
    shapes = shapes_of(str(directory), {**document, **known}, table, dtype.itemsize, False)
    settings = quantization_settings(document)
    return shapes if settings is None else _as_packed(shapes, format_of(settings, directory / CONFIG_FILE))


def _as_packed(shapes: ModelShapes, form: PackedFormat) -> ModelShapes:
    """Estimate what a quantized original takes on disk, where only its configuration is known."""

    def packed(block: BlockShape) -> int:
        linears = 0 if form.packs_only_experts else sum(linear.parameters for linear in block.linears)
        return linears + (block.experts.parameters if block.experts else 0)

    values = sum(packed(block) for block in shapes.blocks)
    stored = (shapes.parameters - values) * shapes.value_bytes + int(values * form.value_bits / 8)
    return replace(shapes, packed_bytes=stored)


_BLOCK = re.compile(r"^((?:.*?\.)?\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "dim")
# Endings of class names whose models predict labels or positions instead of words.
_WITHOUT_VOCABULARY = ("Classification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")


def shapes_from_headers(directory: str | Path) -> ModelShapes:
    """Read the shapes of a checkpoint. Raises `InputError` if it cannot be read or repeats no layers."""
    stored = Checkpoint.open(directory)
    document = read_model_config(stored.directory)
    dtype, _ = next(iter(floating_bytes(stored).most_common(1)), ("F32", 0))
    checkpoint = unpacked(stored, document, dtype)
    table = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes = shapes_of(str(directory), document, table, DTYPE_BITS[dtype] // 8, True)
    if checkpoint is stored and not stored.is_gguf:
        return shapes
    packed_bytes = sum(info.size_bytes for info in stored.tensors.values())
    held = checkpoint.unpacking_bytes
    if stored.is_gguf:
        held = max(
            unpacking_bytes(info.size_bytes, math.prod(info.shape), GGUF_SCRATCH_VALUE_BYTES)
            for name, info in stored.tensors.items()
            if name not in GGUF_TABLES
        )
    return replace(shapes, packed_bytes=packed_bytes, unpacking_bytes=held)


def shapes_of(
    name: str, config: Mapping[str, Any], table: Mapping[str, tuple[int, ...]], stored_bytes: int, has_weights: bool
) -> ModelShapes:
    """Derive shapes from a config document and tensor names; `stored_bytes` applies if the config has no dtype."""
    text = {**config, **(config.get("text_config") or {})}
    inside: dict[str, dict[str, tuple[int, ...]]] = {}
    outside: dict[str, tuple[int, ...]] = {}
    for tensor, shape in table.items():
        inner = _BLOCK.match(tensor)
        if inner:
            inside.setdefault(inner[1], {})[inner[2]] = shape
        else:
            outside[tensor] = shape
    blocks = tuple(_block(block, tensors) for block, tensors in inside.items())
    blocks = tuple(block for block in blocks if block.linears or block.experts)
    if not blocks:
        raise InputError(f"{name}: has no linears in repeated layers to factorize")
    loose = sum(math.prod(shape) for shape in outside.values())
    loose += sum(
        math.prod(shape)
        for block, tensors in inside.items()
        for shape in tensors.values()
        if block not in {kept.name for kept in blocks}
    )
    widths = Counter(linear.in_features for block in blocks for linear in block.linears)
    hidden = _first_whole(text, _HIDDEN_NAMES)
    per_token = _first_whole(text, EXPERTS_PER_TOKEN_NAMES) or 1
    return ModelShapes(
        name=name,
        value_bytes=_value_bytes(text, stored_bytes),
        hidden=hidden or widths.most_common(1)[0][0],
        vocabulary=_first_whole(text, ("vocab_size",)) or 0,
        blocks=blocks,
        outside_parameters=loose,
        experts_per_token=per_token,
        has_weights=has_weights,
        has_vocabulary_head=not any(
            str(kind).endswith(_WITHOUT_VOCABULARY) for kind in config.get("architectures") or ()
        ),
    )


def _first_whole(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """Return the value of the first of some fields that holds a whole number above zero."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _value_bytes(config: Mapping[str, Any], stored_bytes: int) -> int:
    """Return bytes per parameter in the dtype of computation: the config's, else the checkpoint's."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    named = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
    return named.get(dtype.removeprefix("torch."), stored_bytes)


def _block(name: str, tensors: Mapping[str, tuple[int, ...]]) -> BlockShape:
    """Sort one block's tensors, named relative to it, into linears, experts and the rest."""
    twins: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if expert := _EXPERT.match(tensor):
            twins.setdefault((expert[1], expert[3]), []).append(tensor)
    stacked = {tensor for group in twins.values() if len(group) > 1 for tensor in group}
    experts = _listed_experts(twins, tensors) or _stacked_experts(tensors)
    linears, other = [], 0
    for tensor, shape in tensors.items():
        if tensor in stacked or len(shape) == 3:
            continue
        routes = experts is not None and shape[0] == experts.count
        if len(shape) == 2 and tensor.endswith(".weight") and not routes:
            linears.append(LinearShape(tensor.removesuffix(".weight"), shape[0], shape[1]))
        else:
            other += math.prod(shape)
    return BlockShape(name, tuple(linears), experts, other)


def _listed_experts(
    twins: Mapping[tuple[str, str], list[str]], tensors: Mapping[str, tuple[int, ...]]
) -> ExpertShapes | None:
    """Find experts stored one by one, as `experts.5.up_proj.weight`."""
    groups = [group for group in twins.values() if len(group) > 1 and len(tensors[group[0]]) == 2]
    if not groups:
        return None
    linears = tuple(
        LinearShape(_EXPERT.sub(r"\1.\3", first), tensors[first][0], tensors[first][1]) for first, *_ in groups
    )
    return ExpertShapes(max(len(group) for group in groups), linears)


def _stacked_experts(tensors: Mapping[str, tuple[int, ...]]) -> ExpertShapes | None:
    """Find experts stored as one (count, out, in) tensor."""
    stacks = {tensor: shape for tensor, shape in tensors.items() if len(shape) == 3}
    if not stacks:
        return None
    linears = tuple(LinearShape(tensor, shape[1], shape[2]) for tensor, shape in stacks.items())
    return ExpertShapes(max(shape[0] for shape in stacks.values()), linears)
