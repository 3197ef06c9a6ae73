"""Counts what an emulator of codes holds, from shapes alone: code shape, ranks, bytes and values. Torch-free.

A size is given as for factors in the dtype of residuals: as `ratio`, the share of values that would take as many bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from onelayer.compiler.codes.forms import (
    LEAST_SHARE,
    RESIDUAL_DTYPE,
    WHOLE_SHARE,
    CodeShape,
    coded_bytes,
    fitting_codes,
    trained_code_values,
)
from onelayer.compiler.factors.stored_forms import linear_bytes
from onelayer.compiler.models.unit_memory import decoding_bytes
from onelayer.runtime.planning.shapes import LinearShape, ModelShapes

LEAST_RATIO = LEAST_SHARE / WHOLE_SHARE


@dataclass(frozen=True)
class CodedEmulator:
    """Codes of linears or of experts: their shape, and the rank of the residual factors by (out, in).

    The rank None means that a weight is quantized whole.
    """

    code: CodeShape
    ranks: Mapping[tuple[int, int], int | None]

    def rank(self, linear: LinearShape) -> int | None:
        """Return the rank of a linear's residual factors."""
        return self.ranks[linear.out_features, linear.in_features]

    def stored_bytes(self, linear: LinearShape) -> int:
        """Count the bytes of what replaces a linear."""
        shape, rank = (linear.out_features, linear.in_features), self.rank(linear)
        return linear_bytes(*shape, None, RESIDUAL_DTYPE, 0) if rank is None else coded_bytes(*shape, self.code, rank)

    def trained_values(self, linear: LinearShape) -> int:
        """Count the values that a refinement trains: codebook, scales and residual factors, or the whole weight."""
        if (rank := self.rank(linear)) is None:
            return linear.parameters
        return trained_code_values(linear.out_features, linear.in_features, self.code.width, rank)

    def computed_values(self, linear: LinearShape) -> int:
        """Count the weights that compute one token: all of the decoded weight, and those of the residual factors."""
        return linear.parameters + (self.rank(linear) or 0) * (linear.out_features + linear.in_features)


@lru_cache
def coded_emulator(shapes: ModelShapes, ratio: float) -> CodedEmulator | None:
    """Return what compile makes of a model with codes; None if its linears are too small for codes at this ratio."""
    linears = {
        f"{place} {linear.name}": (linear.out_features, linear.in_features)
        for place, block in enumerate(shapes.blocks)
        for linear in block.compressible
    }
    return _emulator(linears, fitting_codes(linears, share_of(ratio)))


@lru_cache
def coded_experts(shapes: ModelShapes, ratio: float) -> CodedEmulator | None:
    """Return what compile makes of the experts with codes; None if there are none, or they become factors."""
    stacks = {
        f"{place} {stack.name}": (stack.out_features, stack.in_features)
        for place, block in enumerate(shapes.blocks)
        for stack in block.stacks
    }
    return _emulator(stacks, fitting_codes(stacks, share_of(ratio), every=True))


def _emulator(
    shapes: Mapping[str, tuple[int, int]], coded: tuple[CodeShape, dict[str, int | None]] | None
) -> CodedEmulator | None:
    if coded is None:
        return None
    code, ranks = coded
    return CodedEmulator(code, {shapes[name]: rank for name, rank in ranks.items()})


def share_of(ratio: float) -> float:
    """Return the share of the size at 16 bits that belongs to a ratio."""
    return ratio * WHOLE_SHARE


def largest_decoding_bytes(shapes: ModelShapes) -> int:
    """Bound what a product with the largest linear holds for its decoded weight, at the finest codes."""
    linears = (linear for block, _ in shapes.kinds for linear in (*block.compressible, *block.stacks))
    values = max((linear.parameters for linear in linears), default=0)
    return decoding_bytes(values, shapes.value_bytes)
