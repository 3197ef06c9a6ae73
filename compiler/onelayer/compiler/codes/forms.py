"""The coded form of a linear and its size in bytes: arithmetic only, torch-free.

W ~ scale * C[codes] + up down. A code of one byte stands for `width` neighbors in a row, so codes take 8 / width bits a
value. The factors hold what the codes leave out, quantized like those of any emulator.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from onelayer.compiler.factors.stored_forms import REFERENCE_BYTES, SCALE_BYTES, FactorDtype, row_bytes

# Codes of 2 neighbors would be as large as a whole weight in nf4.
CodeWidth = Literal[3, 4, 5, 6, 8]
CODE_WIDTHS: tuple[CodeWidth, ...] = get_args(CodeWidth)
# One byte chooses one of these rows of a codebook, whose entries are bfloat16.
CODEBOOK_ROWS, ENTRY_BYTES = 256, 2
# At most this many neighbors in a row share one bfloat16 scale, and the moments of the inputs are kept for as many at a
# time. Longer rows are split into equal groups, of a multiple of all code widths.
LONGEST_GROUP, GROUP_STEP = 4096, 120
# Moments of the gradients at a linear's outputs are kept in diagonal blocks of this many.
OUTPUT_BLOCK = 64
# The factors of a residual are stored in this dtype.
RESIDUAL_DTYPE: FactorDtype = "nf4"
# Codes take as many bits as leave this many bits a value for the low-rank part. Without it twice as much is lost
# (manifests/LOG.md, codes with a low-rank part); other shares have not been compared at equal bytes.
LEAST_RESIDUAL_BITS = 0.25


def group_size(in_features: int) -> int:
    """Return how many neighbors in a row share a scale and a block of moments."""
    if in_features <= LONGEST_GROUP:
        return in_features
    parts = -(-in_features // (LONGEST_GROUP - GROUP_STEP))
    return -(-in_features // (parts * GROUP_STEP)) * GROUP_STEP


def code_row_bytes(in_features: int, width: CodeWidth) -> int:
    """Bytes of a row of codes, and of its scales."""
    return -(-in_features // width) + SCALE_BYTES * -(-in_features // group_size(in_features))


def codebook_bytes(width: CodeWidth) -> int:
    """Bytes of the codebook of one linear."""
    return CODEBOOK_ROWS * width * ENTRY_BYTES


def coded_bytes(out_features: int, in_features: int, width: CodeWidth, rank: int) -> int:
    """Bytes of a coded linear with residual factors of `rank`."""
    codes = out_features * code_row_bytes(in_features, width) + codebook_bytes(width)
    return codes + rank * direction_bytes(out_features, in_features)


def direction_bytes(out_features: int, in_features: int) -> int:
    """Bytes of one direction of the residual factors."""
    return row_bytes(out_features, RESIDUAL_DTYPE) + row_bytes(in_features, RESIDUAL_DTYPE)


def code_width(keep_bytes: float) -> CodeWidth | None:
    """Choose the finest codes that leave room for a low-rank part; None if even the coarsest do not fit.

    `keep_bytes` is a share of the size at 16 bits.
    """
    bits = 8 * REFERENCE_BYTES * keep_bytes
    return next((width for width in CODE_WIDTHS if 8 / width + LEAST_RESIDUAL_BITS <= bits), None)


def residual_ranks(
    shapes: Mapping[str, tuple[int, int]], keep_bytes: float, width: CodeWidth, spent_bytes: int = 0
) -> dict[str, int]:
    """Spend what the codes of linears (out, in) leave of a share of their bytes on ranks, in proportion to their sizes.

    `spent_bytes` of the budget are taken by something else.
    """
    budget = int(REFERENCE_BYTES * keep_bytes * sum(rows * columns for rows, columns in shapes.values())) - spent_bytes
    budget -= sum(coded_bytes(*shape, width, 0) for shape in shapes.values())
    share = max(0, budget) / max(1, sum(rows * columns for rows, columns in shapes.values()))
    return {
        name: min(int(share * rows * columns / direction_bytes(rows, columns)), rows, columns)
        for name, (rows, columns) in shapes.items()
    }
