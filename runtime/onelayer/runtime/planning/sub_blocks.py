"""Divides a block's linears into sub-blocks, and counts what each keeps per token in training and compiling.

Letters: H is the hidden width, I the inner width of a sub-block (heads times their width, or the width of an MLP), O
the summed output width of its readers, r the rank of the adapter. Torch-free.
"""

from dataclasses import dataclass

from onelayer.compiler.models.unit_memory import routed_width
from onelayer.runtime.planning.shapes import BlockShape, LinearShape, ModelShapes

MASTER_BYTES = 4  # adapters, norms and losses are computed in float32, whatever the model's dtype


@dataclass(frozen=True)
class SubBlock:
    """Linears that read one normed input, and the linear that leads back to the hidden width."""

    readers: tuple[LinearShape, ...]
    closing: LinearShape | None
    hidden: int

    @property
    def inner(self) -> int:
        """I: the input width of the closing linear."""
        return self.closing.in_features if self.closing else 0

    @property
    def opened(self) -> int:
        """O: the summed output widths of the readers."""
        return sum(linear.out_features for linear in self.readers)

    @property
    def is_gated(self) -> bool:
        """Whether two halves of the inner width are multiplied: an MLP with a gate, fused or not."""
        widths = [linear.out_features for linear in self.readers]
        return widths in ([self.inner, self.inner], [2 * self.inner])

    @property
    def is_plain(self) -> bool:
        """Whether one linear leads up and one down: an MLP without a gate."""
        return [linear.out_features for linear in self.readers] == [self.inner]

    def saved_per_token(self, value_bytes: int, lora_rank: int, copy_bytes: int | None) -> int:
        """Count the bytes that autograd keeps per token.

        They are the norm's input and output, what activation or attention needs, and the inputs of the adapters. In
        half precision each linear's adapter reads a copy of its own, of `copy_bytes` a value.
        """
        if any(linear.modulates for linear in self.readers):
            return 0  # a row for each picture, not for each token
        linears = len(self.readers) + (self.closing is not None)
        low = linears * lora_rank * (copy_bytes or value_bytes)
        if copy_bytes is None:
            inner = self.inner * (2 if self.is_gated else 1)
            return value_bytes * (2 * self.hidden + self.opened + inner) + low
        copies = sum(linear.in_features for linear in self.readers) + self.inner
        inner = 0 if self.is_plain else self.inner
        return MASTER_BYTES * self.hidden + value_bytes * (self.opened + inner) + copy_bytes * copies + low


def sub_blocks(block: BlockShape) -> tuple[SubBlock, ...]:
    """Divide a block into sub-blocks by the module that contains their linears; those of a projector stand alone."""
    if block.projects:
        return tuple(SubBlock((linear,), None, linear.in_features) for linear in block.linears)
    hidden = block.hidden
    groups: dict[str, list[LinearShape]] = {}
    for linear in block.linears:
        groups.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    parts = []
    for linears in groups.values():
        back = [linear for linear in linears if linear.out_features == hidden]
        narrow = [linear for linear in back if linear.in_features != hidden]
        closing = next(iter(narrow or back), None)
        parts.append(SubBlock(tuple(linear for linear in linears if linear is not closing), closing, hidden))
    return tuple(parts)


def inputs_read(block: BlockShape) -> list[int]:
    """List the features of what compressible linears read, once for those of a sub-block that read the same."""
    compressed, found = set(block.compressible), list[int]()
    for part in sub_blocks(block):
        found += {linear.in_features for linear in part.readers if linear in compressed}
        found += [part.closing.in_features] if part.closing in compressed else []
    return found


def expert_parts(shapes: ModelShapes, block: BlockShape) -> tuple[int, int]:
    """Return the summed reader width of a token's active experts, and their inner width; zeros without experts."""
    if block.experts is None:
        return 0, 0
    # Stacks may be transposed. The opening matrix is as wide as the closing one, or twice as wide with a gate.
    widths = [
        linear.in_features if linear.out_features == block.hidden else linear.out_features
        for linear in block.experts.stacks
    ]
    return shapes.experts_per_token * max(widths), shapes.experts_per_token * min(widths)


def lora_parameters(shapes: ModelShapes, lora_rank: int) -> int:
    """Count the parameters of an adapter on every linear of the repeated layers; experts get none."""
    linears = (linear for block in shapes.blocks for linear in block.linears)
    return sum(lora_rank * (linear.in_features + linear.out_features) for linear in linears)


def block_values(shapes: ModelShapes, block: BlockShape, tokens: int) -> int:
    """Count what all matrices of a block read and give for a batch of `tokens`."""
    return block.rows(tokens) * _width(shapes, block)


def most_values(shapes: ModelShapes, tokens: int) -> int:
    """Count what all matrices of one block read and give for a batch of `tokens`, of the block that has the most."""
    return max(block_values(shapes, block, tokens) for block, _ in shapes.kinds)


def _width(shapes: ModelShapes, block: BlockShape) -> int:
    """Sum the input and output widths of a block's matrices for one token, counting each expert that it is sent to."""
    dense = sum(linear.in_features + linear.out_features for linear in block.linears)
    if block.experts is None:
        return dense
    opened, inner = (width // shapes.experts_per_token for width in expert_parts(shapes, block))
    return dense + routed_width(shapes.experts_per_token, opened, inner, block.hidden)
