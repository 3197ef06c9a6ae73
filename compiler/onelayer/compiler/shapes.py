"""A model's shapes in numbers, without torch: repeated blocks and their linears, from headers and config.json.

In: tensor names with their shapes. Out: what a planner needs to count bytes. Nothing is known of architectures: a block
is what lies below the first number in a name (`layers.7.`), and what lies below a second one with many twins is an
expert of a mixture.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from onelayer.compiler.checkpoint import DTYPE_BITS, Checkpoint
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import read_json

_BLOCK = re.compile(r"^((?:.*?\.)?\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
# A linear that holds less than this share of its block's linear weights stays dense: a router or a gate saves nothing
# and decides much.
SMALL_SHARE = 0.005
# Rows of one expert that are computed at a time when its moments are taken.
EXPERT_ROWS = 1024
# A matrix that stays on disk is applied by slices of this size, so that it costs as much whatever the vocabulary.
SLICE_BYTES = 64 << 20
_HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "dim")
# How classes end that answer with labels or places instead of words.
_WITHOUT_VOCABULARY = ("Classification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")
EXPERTS_PER_TOKEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "experts_per_token")


@dataclass(frozen=True)
class Linear:
    """One weight matrix, by the name of its module below the block."""

    name: str
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Experts:
    """The experts of one mixture: how many, and the matrices of one as the checkpoint has them."""

    count: int
    linears: tuple[Linear, ...]

    @property
    def parameters(self) -> int:
        """Of all experts."""
        return self.count * sum(linear.parameters for linear in self.linears)

    @property
    def stacks(self) -> tuple[Linear, ...]:
        """The matrices of one expert as transformers stacks them: a gate lies on top of its twin, in one matrix."""
        shapes = [(linear.out_features, linear.in_features) for linear in self.linears]
        (rows, columns), count = Counter(shapes).most_common(1)[0]
        if len(shapes) != 3 or count != 2:
            return self.linears
        gate = self.linears[shapes.index((rows, columns))]
        others = tuple(linear for linear, shape in zip(self.linears, shapes, strict=True) if shape != (rows, columns))
        return (Linear(gate.name, 2 * rows, columns), *others)


@dataclass(frozen=True)
class Block:
    """One repeated layer: its linears, its experts if it has any, and how many parameters it has beside them."""

    name: str
    linears: tuple[Linear, ...]
    experts: Experts | None
    other_parameters: int

    @property
    def parameters(self) -> int:
        """All of the block's."""
        dense = sum(linear.parameters for linear in self.linears) + self.other_parameters
        return dense + (self.experts.parameters if self.experts else 0)

    @property
    def compressible(self) -> tuple[Linear, ...]:
        """The linears that are large enough to be worth factors."""
        total = sum(linear.parameters for linear in self.linears)
        return tuple(linear for linear in self.linears if linear.parameters >= SMALL_SHARE * total)


@dataclass(frozen=True)
class ModelShapes:
    """All blocks in order, and what lies outside them: `outside_parameters`, embeddings and head for the most part."""

    name: str
    value_bytes: int
    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    outside_parameters: int
    experts_per_token: int
    has_weights: bool
    has_vocabulary_head: bool = True

    @cached_property
    def kinds(self) -> tuple[tuple[Block, int], ...]:
        """One block of each make, and how many there are of it."""
        counts = Counter((block.linears, block.experts, block.other_parameters) for block in self.blocks)
        return tuple((Block(f"{count} alike", *make), count) for make, count in counts.items())

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.outside_parameters + sum(block.parameters for block in self.blocks)

    @property
    def active_parameters(self) -> int:
        """Those that take part in computing one token: of a mixture the experts that it is sent to."""
        idle = 0.0
        for block in self.blocks:
            if block.experts is not None:
                idle += block.experts.parameters * (1 - min(1.0, self.experts_per_token / block.experts.count))
        return self.parameters - int(idle)

    @property
    def largest_block_bytes(self) -> int:
        """Weights of the largest block as they are held."""
        return self.value_bytes * max(block.parameters for block in self.blocks)


def shapes_from_headers(directory: str | Path) -> ModelShapes:
    """Shapes of a checkpoint. Raises `InputError` where it cannot be read or repeats no layers."""
    checkpoint = Checkpoint.open(directory)
    table = {name: info.shape for name, info in checkpoint.tensors.items()}
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype in DTYPE_BITS)
    stored_bytes = DTYPE_BITS[dtypes.most_common(1)[0][0]] // 8
    return shapes_of(str(directory), read_json(checkpoint.directory / "config.json"), table, stored_bytes, True)


def shapes_of(
    name: str, config: Mapping[str, Any], table: Mapping[str, tuple[int, ...]], stored_bytes: int, has_weights: bool
) -> ModelShapes:
    """Shapes from a config document and a table of tensor names; `stored_bytes` counts where it names no dtype."""
    if config.get("quantization_config"):
        raise InputError(f"{name}: field quantization_config: quantised weights; give the unquantised original")
    text = {**config, **(config.get("text_config") or {})}
    inside: dict[str, dict[str, tuple[int, ...]]] = {}
    outside: dict[str, tuple[int, ...]] = {}
    for tensor, shape in table.items():
        found = _BLOCK.match(tensor)
        if found:
            inside.setdefault(found[1], {})[found[2]] = shape
        else:
            outside[tensor] = shape
    blocks = tuple(_block(block, tensors) for block, tensors in inside.items())
    blocks = tuple(block for block in blocks if block.linears or block.experts)
    if not blocks:
        raise InputError(f"{name}: has no linears in repeated layers to factorise")
    loose = sum(math.prod(shape) for shape in outside.values())
    loose += sum(
        math.prod(shape)
        for block, tensors in inside.items()
        for shape in tensors.values()
        if block not in {kept.name for kept in blocks}
    )
    widths = Counter(linear.in_features for block in blocks for linear in block.linears)
    hidden = next((int(text[key]) for key in _HIDDEN_NAMES if isinstance(text.get(key), int)), None)
    per_token = next((int(text[key]) for key in EXPERTS_PER_TOKEN_NAMES if isinstance(text.get(key), int)), 1)
    return ModelShapes(
        name=name,
        value_bytes=_value_bytes(text, stored_bytes),
        hidden=hidden or widths.most_common(1)[0][0],
        vocabulary=int(text.get("vocab_size") or 0),
        blocks=blocks,
        outside_parameters=loose,
        experts_per_token=per_token,
        has_weights=has_weights,
        has_vocabulary_head=not any(
            str(kind).endswith(_WITHOUT_VOCABULARY) for kind in config.get("architectures") or ()
        ),
    )


def _value_bytes(config: Mapping[str, Any], stored_bytes: int) -> int:
    """Bytes per parameter as the model is computed: the config's dtype, else the checkpoint's."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    named = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
    return named.get(dtype.removeprefix("torch."), stored_bytes)


def _block(name: str, tensors: Mapping[str, tuple[int, ...]]) -> Block:
    """One block's tensors by name below it, sorted into linears, experts and the rest."""
    twins: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if found := _EXPERT.match(tensor):
            twins.setdefault((found[1], found[3]), []).append(tensor)
    stacked = {tensor for group in twins.values() if len(group) > 1 for tensor in group}
    experts = _listed_experts(twins, tensors) or _stacked_experts(tensors)
    linears, other = [], 0
    for tensor, shape in tensors.items():
        if tensor in stacked or len(shape) == 3:
            continue
        routes = experts is not None and shape[0] == experts.count
        if len(shape) == 2 and tensor.endswith(".weight") and not routes:
            linears.append(Linear(tensor.removesuffix(".weight"), shape[0], shape[1]))
        else:
            other += math.prod(shape)
    return Block(name, tuple(linears), experts, other)


def _listed_experts(
    twins: Mapping[tuple[str, str], list[str]], tensors: Mapping[str, tuple[int, ...]]
) -> Experts | None:
    """Experts stored one by one, as `experts.5.up_proj.weight`."""
    groups = [group for group in twins.values() if len(group) > 1 and len(tensors[group[0]]) == 2]
    if not groups:
        return None
    linears = tuple(Linear(_EXPERT.sub(r"\1.\3", first), tensors[first][0], tensors[first][1]) for first, *_ in groups)
    return Experts(max(len(group) for group in groups), linears)


def _stacked_experts(tensors: Mapping[str, tuple[int, ...]]) -> Experts | None:
    """Experts stored as one (count, out, in) tensor."""
    stacks = {tensor: shape for tensor, shape in tensors.items() if len(shape) == 3}
    if not stacks:
        return None
    linears = tuple(Linear(tensor, shape[1], shape[2]) for tensor, shape in stacks.items())
    return Experts(max(shape[0] for shape in stacks.values()), linears)


def read_config_document(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises `InputError` naming the file."""
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory}: has no config.json; give a transformers model directory")
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: is no mapping ({json.dumps(document)[:40]}); restore the file")
    return document


def routed_width(experts_per_token: int, opened: int, inner: int, hidden: int) -> int:
    """What experts read and give of one token, once for each that it is sent to.

    The first matrix takes `hidden` features to `opened` ones, the second takes the `inner` that are left of these back.
    """
    return experts_per_token * (opened + inner + 2 * hidden)


def graph_bytes(width: int, tokens: int, value_bytes: int, on_gpu: bool) -> int:
    """What the graph of one unit takes on a batch, at most; on a host with the holes that it leaves in the heap.

    `width` are inputs and outputs of all matrices of the unit for a token, of experts `routed_width`: as much again for
    norms, activations and residual sums. On a host as much as all that for the holes between tensors below 32 MB, which
    glibc's heap gives back only when asked; asking at every step would take a third longer (manifests/LOG.md).
    """
    return (2 if on_gpu else 4) * tokens * width * max(4, value_bytes)
