"""Packed values in, floats out: the arithmetic of the formats, on the host."""

import torch

# Values are widened to float32 by slices of about this size.
SLICE_BYTES = 8 << 20
# 4-bit floats with 2 bits of exponent and 1 of mantissa (E2M1).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes are exponents of 2 with an offset of 127 (E8M0, OCP Microscaling)."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float()


def fp4_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Unpack two 4-bit floats (E2M1) from each byte, the lower half first: (..., n) to (..., 2 n) in float32."""
    table = torch.tensor(FP4_VALUES)
    packed = packed.view(torch.uint8)
    pairs = torch.stack([packed & 0xF, packed >> 4], dim=-1)
    return table[pairs.int()].flatten(-2)


def scale_blocks(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Multiply each block of rows and columns of `values` by its scale; blocks at the far ends may be partial.

    `values` has `shape` (..., R, C), or half as many columns in bytes of two 4-bit floats. `scales`: one for all, or
    (..., ceil(R / block rows), ceil(C / block columns)). The product is taken in float32 and rounded to `dtype`.
    """
    rows, columns = shape[-2:]
    unpacked = torch.empty(shape, dtype=dtype)
    stack = unpacked.view(-1, rows, columns)
    stored = values.reshape(len(stack), rows, values.shape[-1])
    grids = scales.expand(*shape[:-2], *scales.shape[-2:]).reshape(len(stack), *scales.shape[-2:])
    step = max(1, SLICE_BYTES // (4 * columns * block[0])) * block[0]
    for matrix, packed, grid in zip(stack, stored, grids, strict=True):
        for start in range(0, rows, step):
            part = packed[start : start + step]
            wide = fp4_pairs(part) if part.shape[-1] != columns else part.float()
            _multiply(wide, grid[start // block[0] :], block)
            matrix[start : start + step] = wide
    return unpacked


def _multiply(wide: torch.Tensor, grid: torch.Tensor, block: tuple[int, int]) -> None:
    """Multiply the blocks of a matrix in place: whole blocks at once, then those that end with the matrix."""
    for first, last, height in _runs(wide.shape[0], block[0]):
        for left, right, width in _runs(wide.shape[1], block[1]):
            blocks = wide[first:last, left:right].unflatten(1, (-1, width)).unflatten(0, (-1, height))
            count = blocks.shape[0], blocks.shape[2]
            start = first // block[0], left // block[1]
            blocks *= grid[start[0] : start[0] + count[0], None, start[1] : start[1] + count[1], None]


def _runs(size: int, block: int) -> list[tuple[int, int, int]]:
    """List (start, stop, block size) of the run of whole blocks of a side, and of the partial block at its end."""
    whole = size - size % block
    runs = [(0, whole, block), (whole, size, size - whole)]
    return [run for run in runs if run[1] > run[0]]
