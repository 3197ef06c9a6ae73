"""A model's shapes in numbers, without torch: repeated blocks and their linears, from headers and config.json.

In: tensor names with their shapes. Out: what a planner needs to count bytes. Knows no architecture: a block is
everything below the first number in a name (`layers.7.`). Everything below a second number, repeated many times in
equal shape, is an expert of a mixture.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from onelayer.compiler.models.unit_memory import SMALL_SHARE
from onelayer.runtime.planning.media import Media, Table, is_kernel


@dataclass(frozen=True)
class LinearShape:
    """One weight matrix; its name is that of its module relative to the block.

    One that `modulates` reads a single row for each picture.
    """

    name: str
    out_features: int
    in_features: int
    modulates: bool = False

    @property
    def parameters(self) -> int:
        """The number of parameters of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ExpertShapes:
    """The experts of one mixture: their number, and the matrices of one as the checkpoint stores them."""

    count: int
    linears: tuple[LinearShape, ...]

    @property
    def parameters(self) -> int:
        """The number of parameters of all experts."""
        return self.count * sum(linear.parameters for linear in self.linears)

    @property
    def stacks(self) -> tuple[LinearShape, ...]:
        """The matrices of one expert as transformers stacks them: a gate and its twin share one matrix."""
        shapes = [(linear.out_features, linear.in_features) for linear in self.linears]
        (rows, columns), count = Counter(shapes).most_common(1)[0]
        if len(shapes) != 3 or count != 2:
            return self.linears
        gate = self.linears[shapes.index((rows, columns))]
        others = tuple(linear for linear, shape in zip(self.linears, shapes, strict=True) if shape != (rows, columns))
        return (LinearShape(gate.name, 2 * rows, columns), *others)


@dataclass(frozen=True)
class BlockShape:
    """One repeated layer: its linears, its experts if any, its number of other parameters, and its hidden width.

    `media_rows` is how many rows it computes for the images or sound of an example (patches, frames); 0 for a layer
    that computes the tokens of the text. `rows_per_token` converts tokens of a batch into rows of the layer. One that
    `projects` leads from a tower to the language model: its linears follow one another, and none is recomputed.
    """

    name: str
    linears: tuple[LinearShape, ...]
    experts: ExpertShapes | None
    other_parameters: int
    hidden: int
    media_rows: int = 0
    rows_per_token: float = 1.0
    projects: bool = False

    @property
    def stacks(self) -> tuple[LinearShape, ...]:
        """The matrices of one expert, as transformers stacks them; none without experts."""
        return () if self.experts is None else self.experts.stacks

    def rows(self, tokens: int) -> int:
        """Return how many rows the layer computes when a batch has `tokens`."""
        return round(tokens * self.rows_per_token)

    @property
    def parameters(self) -> int:
        """The number of parameters of the block."""
        dense = sum(linear.parameters for linear in self.linears) + self.other_parameters
        return dense + (self.experts.parameters if self.experts else 0)

    @property
    def compressible(self) -> tuple[LinearShape, ...]:
        """The linears that are large enough to be worth factorizing."""
        total = sum(linear.parameters for linear in self.linears)
        return tuple(linear for linear in self.linears if linear.parameters >= SMALL_SHARE * total)

    @property
    def compressible_sides(self) -> list[tuple[int, int]]:
        """The output and input features of the compressible linears."""
        return [(linear.out_features, linear.in_features) for linear in self.compressible]


@dataclass(frozen=True)
class ModelShapes:
    """All blocks in order. `outside_parameters` counts the rest, mostly embeddings and head.

    `looked_up_parameters` are those of the rest that no token is multiplied by: embeddings, unless the head is tied.

    `media` are the images or the sound of an example, if the model reads any; `hidden` and `vocabulary` are the text's.

    Of a quantized original `packed_bytes` is what its weights take on disk, and `unpacking_bytes` what unpacking one
    of them holds. A denoiser computes `positions` for a picture with its prompt; None for other models.
    """

    name: str
    value_bytes: int
    hidden: int
    vocabulary: int
    blocks: tuple[BlockShape, ...]
    outside_parameters: int
    experts_per_token: int
    has_weights: bool
    has_vocabulary_head: bool = True
    packed_bytes: int | None = None
    unpacking_bytes: int = 0
    media: Media | None = None
    positions: int | None = None
    looked_up_parameters: int = 0

    @property
    def unpacked_bytes(self) -> int:
        """The bytes of all weights in the dtype of computation."""
        return self.parameters * self.value_bytes

    @property
    def stored_bytes(self) -> int:
        """The bytes of all weights on disk, which a pass reads."""
        return self.unpacked_bytes if self.packed_bytes is None else self.packed_bytes

    @cached_property
    def kinds(self) -> tuple[tuple[BlockShape, int], ...]:
        """One block of each distinct shape, with its count."""
        counts = Counter(replace(block, name="") for block in self.blocks)
        return tuple((replace(block, name=f"{count} alike"), count) for block, count in counts.items())

    def at_length(self, max_length: int) -> "ModelShapes":
        """Return the shapes for examples of `max_length` tokens, each with its images or sound."""
        blocks = (
            replace(block, rows_per_token=block.media_rows / max_length) if block.media_rows else block
            for block in self.blocks
        )
        return replace(self, blocks=tuple(blocks))

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        return self.outside_parameters + sum(block.parameters for block in self.blocks)

    @property
    def active_parameters(self) -> int:
        """The number of parameters that one token is multiplied by: in a mixture, only the experts that it is sent to.

        Those that compute images or sound count once for each of their rows to a token. An embedding is looked up.
        """
        idle = float(self.looked_up_parameters)
        for block in self.blocks:
            idle += block.parameters * (1 - block.rows_per_token)
            if block.experts is not None:
                idle += block.experts.parameters * (1 - min(1.0, self.experts_per_token / block.experts.count))
        return self.parameters - int(idle)

    @property
    def largest_block_bytes(self) -> int:
        """The bytes of the largest block's weights in the dtype of computation."""
        return self.value_bytes * max(block.parameters for block in self.blocks)


_EXPERT = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


def block_of(name: str, tensors: Table, known: Collection[str] | None = None) -> BlockShape:
    """Sort one block's tensors, named relative to it, into linears, experts and the rest.

    `known` are the names of the linears, the block's own being ''; experts are stacked then. If it is None, all
    matrices but routers are linears, or experts that are stored one by one.
    """
    twins: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors if known is None else ():
        if expert := _EXPERT.match(tensor):
            twins.setdefault((expert[1], expert[3]), []).append(tensor)
    stacked = {tensor for group in twins.values() if len(group) > 1 for tensor in group}
    experts = _listed_experts(twins, tensors) or _stacked_experts(tensors)
    linears, other = [], 0
    for tensor, shape in tensors.items():
        if tensor in stacked or _is_stack(tensor, shape):
            continue
        routes = experts is not None and shape[0] == experts.count
        path, _, leaf = tensor.rpartition(".")
        if len(shape) == 2 and leaf == "weight" and (path in known if known is not None else path and not routes):
            linears.append(LinearShape(path, shape[0], shape[1]))
        else:
            other += math.prod(shape)
    widths = Counter(linear.in_features for linear in linears or (experts.linears if experts else ()))
    return BlockShape(
        name, tuple(linears), experts, other, hidden=next((width for width, _ in widths.most_common(1)), 0)
    )


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


def _is_stack(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stacks the matrices of experts; the kernel of a convolution has three sides too."""
    return len(shape) == 3 and not is_kernel(tensor, shape)


def _stacked_experts(tensors: Mapping[str, tuple[int, ...]]) -> ExpertShapes | None:
    """Find experts stored as one (count, out, in) tensor."""
    stacks = {tensor: shape for tensor, shape in tensors.items() if _is_stack(tensor, shape)}
    if not stacks:
        return None
    linears = tuple(LinearShape(tensor, shape[1], shape[2]) for tensor, shape in stacks.items())
    return ExpertShapes(max(shape[0] for shape in stacks.values()), linears)
