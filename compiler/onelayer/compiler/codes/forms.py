"""The coded form of a linear and its size in bytes: arithmetic only, torch-free.

W ~ scale * C[codes] + up down. A code of one byte stands for `width` neighbors in a row, so codes take 8 / width bits a
value. The factors hold what the codes leave out, quantized like those of any emulator.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from onelayer.compiler.factors.stored_forms import (
    REFERENCE_BYTES,
    SCALE_BYTES,
    FactorDtype,
    bytes_per_value,
    linear_bytes,
    row_bytes,
)

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
# A product decodes at most this many values at once, so that it never holds the whole weight of a wide linear.
DECODED_VALUES = 16 << 20
# The factors of a residual are stored in this dtype.
RESIDUAL_DTYPE: FactorDtype = "nf4"
# Codes take as many bits as leave this many bits a value for the low-rank part. Without it twice as much is lost
# (manifests/LOG.md, codes with a low-rank part); other shares have not been compared at equal bytes.
LEAST_RESIDUAL_BITS = 0.25
# The least share of the bytes at 16 bits that codes need, and the share from which weights fit whole in the residual's
# dtype. In between, codes lose less than factors at every size measured (manifests/LOG.md, the recipe of codes).
LEAST_SHARE = (8 / CODE_WIDTHS[-1] + LEAST_RESIDUAL_BITS) / (8 * REFERENCE_BYTES)
WHOLE_SHARE = bytes_per_value(RESIDUAL_DTYPE) / REFERENCE_BYTES


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


def trained_code_values(out_features: int, in_features: int, width: CodeWidth, rank: int) -> int:
    """Count what a refinement trains of a coded linear: its codebook, its scales and residual factors of `rank`."""
    scales = out_features * -(-in_features // group_size(in_features))
    return rank * (out_features + in_features) + scales + CODEBOOK_ROWS * width


def code_width(keep_bytes: float) -> CodeWidth | None:
    """Choose the finest codes that leave room for a low-rank part; None if even the coarsest do not fit.

    `keep_bytes` is a share of the size at 16 bits.
    """
    bits = 8 * REFERENCE_BYTES * keep_bytes
    return next((width for width in CODE_WIDTHS if 8 / width + LEAST_RESIDUAL_BITS <= bits), None)


def are_codes_best(keep_bytes: float) -> bool:
    """Whether codes are the best form at a share of the size at 16 bits, for linears that are wide enough for them."""
    return LEAST_SHARE <= keep_bytes < WHOLE_SHARE


def coded_ranks(
    shapes: Mapping[str, tuple[int, int]], keep_bytes: float, width: CodeWidth
) -> dict[str, int | None] | None:
    """Return the rank of the residual factors of each linear (out, in), for all to take `keep_bytes` of their size.

    What codes leave of the budget is spent in proportion to sizes. A linear whose codes would be no smaller than its
    quantized weight has the rank None and is quantized whole. None in place of all ranks means that linears are too
    small for codes: some of them would get no rank, or nothing is coded.
    """
    whole = {name: linear_bytes(*shape, None, RESIDUAL_DTYPE, 0) for name, shape in shapes.items()}
    coded = {name: shape for name, shape in shapes.items() if coded_bytes(*shape, width, 0) < whole[name]}
    budget = REFERENCE_BYTES * keep_bytes * sum(rows * columns for rows, columns in shapes.values())
    budget -= sum(whole[name] for name in shapes.keys() - coded.keys())
    budget -= sum(coded_bytes(*shape, width, 0) for shape in coded.values())
    share = max(0, int(budget)) / max(1, sum(rows * columns for rows, columns in coded.values()))
    ranks = {
        name: min(int(share * rows * columns / direction_bytes(rows, columns)), rows, columns)
        for name, (rows, columns) in coded.items()
    }
    return {name: ranks.get(name) for name in shapes} if ranks and all(ranks.values()) else None
