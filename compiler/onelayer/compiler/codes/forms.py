"""The coded form of a linear and its size in bytes: arithmetic only, torch-free.

W ~ scale * C[windows] + up down. A code of `bits` bits stands for `width` neighbors in a row. It chooses a row of the
codebook together with the bits before it, eight in all: its window. So one code bears on several neighborhoods, as in
trellis-coded quantization (Marcellin and Fischer 1990; QTIP, arXiv 2406.11235). The factors hold what the codes leave
out, quantized like those of any emulator.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from onelayer.compiler.factors.stored_forms import (
    REFERENCE_BYTES,
    SCALE_BYTES,
    FactorDtype,
    bytes_per_value,
    linear_bytes,
    row_bytes,
)

CodeWidth = Literal[2, 3, 4, 5, 6, 8]
CodeBits = Literal[3, 4, 5, 6, 7, 8]


class CodeShape(NamedTuple):
    """Codes of `bits` bits for `width` neighbors each. With eight bits, as compiled before, codes do not overlap."""

    width: CodeWidth
    bits: CodeBits


# What compile chooses from, the finest first: 3.5, 3, 2.5, 2, 1.67, 1.5, 1.33 and 1 bit a value.
CODE_SHAPES = (
    CodeShape(2, 7),
    CodeShape(2, 6),
    CodeShape(2, 5),
    CodeShape(2, 4),
    CodeShape(3, 5),
    CodeShape(2, 3),
    CodeShape(3, 4),
    CodeShape(4, 4),
)
# A window of so many bits chooses one of the rows of a codebook, whose entries are bfloat16.
WINDOW_BITS: Literal[8] = 8
CODEBOOK_ROWS, ENTRY_BYTES = 1 << WINDOW_BITS, 2
# At most this many neighbors in a row share one bfloat16 scale, and the moments of the inputs are kept for as many at a
# time. Longer rows are split into equal groups, of a multiple of all code widths.
LONGEST_GROUP, GROUP_STEP = 4096, 120
# In a search for codes every path makes up for its errors within this many columns. They are decided once the paths of
# as many more have come. Then all columns to the right take up the errors at once, so that large products do the work.
LAZY_COLUMNS = 32
# A search holds at most this many values of paths at once; rows do not know of each other.
PATH_VALUES = 1 << 22
# Moments of the gradients at a linear's outputs are kept in diagonal blocks of this many.
OUTPUT_BLOCK = 64
# A product decodes at most this many values at once, so that it never holds the whole weight of a wide linear.
DECODED_VALUES = 16 << 20
# The factors of a residual are stored in this dtype.
RESIDUAL_DTYPE: FactorDtype = "nf4"
# Codes take as many bits as leave this many bits a value for the low-rank part. Without it twice as much is lost, and
# with more of it and coarser codes more is lost at equal bytes (manifests/LOG.md, codes whose windows overlap).
LEAST_RESIDUAL_BITS = 0.15
# The least share of the bytes at 16 bits that codes need, and the share from which weights fit whole in the residual's
# dtype. In between, codes lose less than factors at every size measured (manifests/LOG.md, the recipe of codes).
LEAST_SHARE = (CODE_SHAPES[-1].bits / CODE_SHAPES[-1].width + LEAST_RESIDUAL_BITS) / (8 * REFERENCE_BYTES)
WHOLE_SHARE = bytes_per_value(RESIDUAL_DTYPE) / REFERENCE_BYTES


def group_size(in_features: int) -> int:
    """Return how many neighbors in a row share a scale and a block of moments."""
    if in_features <= LONGEST_GROUP:
        return in_features
    parts = -(-in_features // (LONGEST_GROUP - GROUP_STEP))
    return -(-in_features // (parts * GROUP_STEP)) * GROUP_STEP


def code_row_bytes(in_features: int, shape: CodeShape) -> int:
    """Bytes of a row of codes, the first with the bits before it, and of its scales."""
    bits = (-(-in_features // shape.width) - 1) * shape.bits + WINDOW_BITS
    return -(-bits // 8) + SCALE_BYTES * -(-in_features // group_size(in_features))


def codebook_bytes(shape: CodeShape) -> int:
    """Bytes of the codebook of one linear."""
    return CODEBOOK_ROWS * shape.width * ENTRY_BYTES


def coded_bytes(out_features: int, in_features: int, shape: CodeShape, rank: int) -> int:
    """Bytes of a coded linear with residual factors of `rank`."""
    codes = out_features * code_row_bytes(in_features, shape) + codebook_bytes(shape)
    return codes + rank * direction_bytes(out_features, in_features)


def direction_bytes(out_features: int, in_features: int) -> int:
    """Bytes of one direction of the residual factors."""
    return row_bytes(out_features, RESIDUAL_DTYPE) + row_bytes(in_features, RESIDUAL_DTYPE)


def rows_at_once(bits: int) -> int:
    """Return how many rows a search for codes of so many bits takes at once: a path for each state of a trellis."""
    return PATH_VALUES // (LAZY_COLUMNS << (WINDOW_BITS - bits))


def search_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Bound what a search for codes of so many bits holds, in float32, as measured: paths, their errors and distances.

    That are five times the values of all paths in a block, the weight three times, feedback twice, and the codebook in
    the units of every code, with its terms.
    """
    paths = min(out_features, rows_at_once(bits)) * LAZY_COLUMNS << (WINDOW_BITS - bits)
    columns = group_size(in_features)
    return 4 * (5 * paths + 3 * out_features * in_features + (2 * columns + 3 * CODEBOOK_ROWS) * columns)


def trained_code_values(out_features: int, in_features: int, width: int, rank: int) -> int:
    """Count what a refinement trains of a coded linear: its codebook, its scales and residual factors of `rank`."""
    scales = out_features * -(-in_features // group_size(in_features))
    return rank * (out_features + in_features) + scales + CODEBOOK_ROWS * width


def are_codes_best(keep_bytes: float) -> bool:
    """Whether codes are the best form at a share of the size at 16 bits, for linears that are wide enough for them."""
    return LEAST_SHARE <= keep_bytes < WHOLE_SHARE


def fitting_codes(
    shapes: Mapping[str, tuple[int, int]], keep_bytes: float, *, every: bool = False
) -> tuple[CodeShape, dict[str, int | None]] | None:
    """Choose the finest codes that leave room for a low-rank part, and the rank of that of each linear (out, in).

    `keep_bytes` is the share of their size at 16 bits that all take together. A linear whose codes would be no smaller
    than its quantized weight has the rank None and is quantized whole. None in place of both means that linears are too
    small for codes: some would get no rank, or nothing is coded; with `every`, also that one would not be coded.
    """
    bits = 8 * REFERENCE_BYTES * keep_bytes
    for code in CODE_SHAPES:
        if code.bits / code.width + LEAST_RESIDUAL_BITS <= bits:
            ranks = _coded_ranks(shapes, keep_bytes, code)
            if ranks and all(ranks.values()) and not (every and len(ranks) < len(shapes)):
                return code, {name: ranks.get(name) for name in shapes}
    return None


def _coded_ranks(shapes: Mapping[str, tuple[int, int]], keep_bytes: float, code: CodeShape) -> dict[str, int]:
    """Spend what codes leave of the budget in proportion to the sizes of all linears that are worth coding."""
    whole = {name: linear_bytes(*shape, None, RESIDUAL_DTYPE, 0) for name, shape in shapes.items()}
    coded = {name: shape for name, shape in shapes.items() if coded_bytes(*shape, code, 0) < whole[name]}
    budget = REFERENCE_BYTES * keep_bytes * sum(rows * columns for rows, columns in shapes.values())
    budget -= sum(whole[name] for name in shapes.keys() - coded.keys())
    budget -= sum(coded_bytes(*shape, code, 0) for shape in coded.values())
    share = max(0, int(budget)) / max(1, sum(rows * columns for rows, columns in coded.values()))
    return {
        name: min(int(share * rows * columns / direction_bytes(rows, columns)), rows, columns)
        for name, (rows, columns) in coded.items()
    }
