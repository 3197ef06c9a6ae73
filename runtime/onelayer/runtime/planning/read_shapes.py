"""Reads the shapes of a model's weights from headers alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onelayer.compiler.dequantize.checkpoint import unpacked
from onelayer.compiler.dequantize.formats import format_of, quantization_settings
from onelayer.compiler.dequantize.packed import GGUF_SCRATCH_VALUE_BYTES, GGUF_TABLES, PackedFormat, unpacking_bytes
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.built import Built, build, is_of_several
from onelayer.compiler.models.unit_memory import EXPERTS_PER_TOKEN_NAMES
from onelayer.compiler.storage.checkpoint import INDEX_FILES, SINGLE_FILES, Checkpoint, floating_bytes
from onelayer.compiler.storage.gguf_format import SUFFIX
from onelayer.compiler.storage.model_config import CONFIG_FILE, is_diffusers_config, read_model_config
from onelayer.compiler.storage.safetensors_format import DTYPE_BITS
from onelayer.runtime.planning.media import (
    Media,
    Table,
    looked_up_parameters,
    nearest_tower,
    picture_positions,
    reads_media,
    rows_of,
    tokens_of,
)
from onelayer.runtime.planning.shapes import BlockShape, ModelShapes, block_of


def read_shapes(directory: Path, images: int = 1, image_side: int | None = None) -> ModelShapes:
    """Read shapes from headers if there are weights (without torch), else from the config.

    An example of a model that reads images or sound has `images` of them, with sides of `image_side` pixels or as in
    `rows_of`. Raises `InputError` if the directory holds no model that can be streamed.
    """
    named = any((directory / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))
    if named or next(directory.glob(f"*{SUFFIX}"), None):
        return shapes_from_headers(directory, images, image_side)
    return _shapes_from_config(directory, images, image_side)


def _shapes_from_config(directory: Path, images: int, image_side: int | None) -> ModelShapes:
    document = read_model_config(directory)
    if is_diffusers_config(document):
        import torch

        from onelayer.compiler.libraries import diffusers_models

        known = diffusers_models.read_config(directory)
        empty = diffusers_models.empty_model(known, diffusers_models.model_class(known, directory), torch.bfloat16)
        sizes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
        return denoiser_shapes(directory, dict(empty.config), sizes, torch.bfloat16.itemsize, False, image_side)
    built = build(directory)
    units = built if is_of_several(document) else None
    value_bytes = built.value_bytes
    shapes = shapes_of(str(directory), built.config, built.table, value_bytes, False, images, image_side, units)
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
_MODULATION = re.compile(r"norm|mod(ulation)?(\.|$)", re.IGNORECASE)
_HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "dim")
# Endings of class names whose models predict labels or positions instead of words.
_WITHOUT_VOCABULARY = ("Classification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")


def shapes_from_headers(directory: str | Path, images: int = 1, image_side: int | None = None) -> ModelShapes:
    """Read the shapes of a checkpoint, media as in `read_shapes`.

    Raises `InputError` if it cannot be read or repeats no layers.
    """
    stored = Checkpoint.open(directory)
    document = read_model_config(stored.directory)
    dtype, _ = next(iter(floating_bytes(stored).most_common(1)), ("F32", 0))
    checkpoint = unpacked(stored, document, dtype)
    table: Table = {name: info.shape for name, info in checkpoint.tensors.items()}
    if is_diffusers_config(document):
        return denoiser_shapes(directory, document, table, DTYPE_BITS[dtype] // 8, True, image_side)
    built = build(stored.directory) if is_of_several(document) and not stored.is_gguf else None
    if built is not None:
        document, table = {**document, **built.config}, built.table
    shapes = shapes_of(str(directory), document, table, DTYPE_BITS[dtype] // 8, True, images, image_side, built)
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
    name: str,
    config: Mapping[str, Any],
    table: Table,
    stored_bytes: int,
    has_weights: bool,
    images: int = 1,
    image_side: int | None = None,
    built: Built | None = None,
) -> ModelShapes:
    """Derive shapes from a config document and tensor names; `stored_bytes` applies if the config has no dtype.

    A model of several is `built`: its layers, projectors and linears are then those that compile takes.
    """
    text = {**config, **(config.get("text_config") or {})}
    hidden, vocabulary = _first_whole(text, _HIDDEN_NAMES), _first_whole(text, ("vocab_size",))
    if built is None:
        layers = _layers(table)
        blocks = {path: block_of(path, tensors) for path, tensors in layers.items()}
    else:
        layers = {path: tensors for path, tensors in built.below.items() if not built.projects(path)}
        blocks = {path: block_of(path, tensors, built.linears_in(path)) for path, tensors in layers.items()}
        blocks = {path: block for path, block in blocks.items() if block.linears or block.experts}
    if not blocks:
        raise InputError(f"{name}: has no linears in repeated layers to factorize")
    within = {f"{path}.{tensor}" for path in blocks for tensor in layers[path]}
    entries = {tensor: shape for tensor, shape in table.items() if tensor not in within}
    media: Media | None = None
    towers = dict[str, BlockShape]()
    for path, block in blocks.items():
        layers_of = path.rpartition(".")[0]
        if reads_media(layers_of, entries, vocabulary):
            rows = rows_of(layers_of, entries, config, image_side)
            media = Media(count=images, rows=rows, tokens=tokens_of(rows, config)) if media is None else media
            blocks[path] = towers[layers_of] = replace(block, media_rows=images * rows)
        elif hidden is not None:
            blocks[path] = replace(block, hidden=hidden)
    if built is not None:
        blocks |= {unit.name: unit for unit in _projectors(built, towers)}
    reads_text = [block for block in blocks.values() if not block.media_rows]
    kinds = map(str, config.get("architectures") or ())
    has_head = not any(kind.endswith(_WITHOUT_VOCABULARY) for kind in kinds)
    return ModelShapes(
        name=name,
        value_bytes=_value_bytes(text, stored_bytes),
        hidden=(reads_text or list(blocks.values()))[-1].hidden,
        vocabulary=vocabulary or 0,
        blocks=tuple(blocks.values()),
        outside_parameters=sum(map(math.prod, table.values())) - sum(block.parameters for block in blocks.values()),
        experts_per_token=_first_whole(text, EXPERTS_PER_TOKEN_NAMES) or 1,
        has_weights=has_weights,
        has_vocabulary_head=has_head,
        looked_up_parameters=looked_up_parameters(entries, vocabulary, hidden, has_head),
        media=media if reads_text or media is None else media.model_copy(update={"tokens": 0}),
    )


def _projectors(built: Built, towers: Mapping[str, BlockShape]) -> Iterator[BlockShape]:
    """Yield the units between towers and language model.

    A projector that merges rows reads as many values as the tower gives, in fewer and wider rows. Without a tower that
    is known it computes the tokens of the text.
    """
    for path, tensors in built.below.items():
        if not built.projects(path):
            continue
        block = replace(block_of(path, tensors, built.linears_in(path)), projects=True)
        if block.linears and towers:
            tower, width = towers[nearest_tower(path, towers)], block.linears[0].in_features
            rows = round(tower.media_rows * min(1.0, tower.hidden / width))
            block = replace(block, hidden=width, media_rows=rows)
        if block.linears:
            yield block


def denoiser_shapes(
    directory: str | Path,
    config: Mapping[str, Any],
    table: Table,
    value_bytes: int,
    has_weights: bool,
    image_side: int | None = None,
) -> ModelShapes:
    """Derive the shapes of a denoiser: all its lists of layers compute the picture, and no head follows.

    The autoencoder's config is read next to it, in its pipeline. Raises `InputError` if it repeats no layers.
    """
    layers, deeper = dict[str, dict[str, tuple[int, ...]]](), _outermost(table)
    while deeper:
        path, tensors = deeper.popitem()
        inside = {f"{path}.{name}": part for name, part in _outermost(tensors).items() if _is_layer(part)}
        deeper |= inside
        layers |= {} if inside else {path: tensors}
    blocks = {path: block_of(path, layers[path]) for path in sorted(layers)}
    blocks = {path: _marked(block) for path, block in blocks.items() if block.linears}
    if not blocks:
        raise InputError(f"{directory}: has no linears in repeated layers to factorize")
    vae = Path(directory).parent / "vae"
    known = read_model_config(vae) if (vae / CONFIG_FILE).is_file() else {}
    total = sum(math.prod(shape) for shape in table.values())
    return ModelShapes(
        name=str(directory),
        value_bytes=value_bytes,
        hidden=max(block.hidden for block in blocks.values()),
        vocabulary=0,
        blocks=tuple(blocks.values()),
        outside_parameters=total - sum(block.parameters for block in blocks.values()),
        experts_per_token=1,
        has_weights=has_weights,
        has_vocabulary_head=False,
        positions=picture_positions(config, known, image_side),
    )


def _marked(block: BlockShape) -> BlockShape:
    """Mark the linears that compute a modulation from the time; their modules are norms or named after it."""
    linears = (replace(linear, modulates=bool(_MODULATION.search(linear.name))) for linear in block.linears)
    return replace(block, linears=tuple(linears))


def _outermost(table: Table) -> dict[str, dict[str, tuple[int, ...]]]:
    """Group tensors by the first number in their names."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in table.items():
        if outer := _BLOCK.match(tensor):
            found.setdefault(outer[1], {})[outer[2]] = shape
    return found


def _layers(table: Table) -> dict[str, dict[str, tuple[int, ...]]]:
    """Group the tensors of repeated layers by the layer's name; their names become relative to it.

    Layers within layers are the layers (a stage of Swin). If two lists stand in one module, the longer one has the
    layers (the other one merges what these give).
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, tensors in _outermost(table).items():
        nested = {f"{path}.{name}": part for name, part in _outermost(tensors).items()}
        inside = {name: part for name, part in nested.items() if _is_layer(part)}
        layers |= inside or {path: tensors}
    layers = {
        path: tensors for path, tensors in layers.items() if (block := block_of(path, tensors)).linears or block.experts
    }
    counts = Counter(path.rpartition(".")[0] for path in layers)
    longest: dict[str, int] = {}
    for path, count in counts.items():
        parent = path.rpartition(".")[0]
        longest[parent] = max(longest.get(parent, 0), count)
    lists = {path for path, count in counts.items() if count == longest[path.rpartition(".")[0]]}
    return {path: tensors for path, tensors in layers.items() if path.rpartition(".")[0] in lists}


def _is_layer(tensors: Table) -> bool:
    """Whether tensors are those of a layer: several linears and a norm. An expert has no norm."""
    weights = [shape for tensor, shape in tensors.items() if tensor.endswith("weight")]
    return sum(len(shape) == 2 for shape in weights) > 1 and any(len(shape) == 1 for shape in weights)


def _first_whole(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """Return the value of the first of some fields that holds a whole number above zero."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _value_bytes(config: Mapping[str, Any], stored_bytes: int) -> int:
    """Return bytes per parameter in the dtype of computation: the config's, else the checkpoint's."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    named = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
    return named.get(dtype.removeprefix("torch."), stored_bytes)
