"""Packed values in, floats out: the arithmetic of the formats, on the host."""

from collections.abc import Callable, Sequence

import torch

from onelayer.compiler.dequantize.packed import SLICE_BYTES

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
    slices = _slices(rows, max(1, SLICE_BYTES // (4 * columns)), block[0])
    for matrix, packed, grid in zip(stack, stored, grids, strict=True):
        for start, stop in slices:
            part = packed[start:stop]
            wide = fp4_pairs(part) if part.shape[-1] != columns else part.float()
            _multiply(wide, grid[start // block[0] :], block)
            matrix[start:stop] = wide
    return unpacked


def _slices(rows: int, most: int, block: int) -> list[tuple[int, int]]:
    """List (start, stop) of slices of at most `most` rows: whole blocks, or parts of a block that is larger."""
    span = max(most - most % block, block)
    spans = [(start, min(start + span, rows)) for start in range(0, rows, span)]
    return [(start, min(start + most, stop)) for first, stop in spans for start in range(first, stop, most)]


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


def unpack_words(words: torch.Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Unfold the values of `bits` that 32-bit words hold along `dim`, from the lowest bits on, or in `order`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    if order is not None:
        shifts = shifts[list(order)]
    shifts = shifts.view(-1, *[1] * (words.ndim - dim - 1))
    values = words.unsqueeze(dim + 1) >> shifts
    values &= (1 << bits) - 1
    return values.flatten(dim, dim + 1)


def scale_groups(
    values: Callable[[int, int], torch.Tensor],
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return (values - zeros) * scales as (out, in), in float32 and then rounded to `dtype`.

    `values(start, stop)` unpacks the rows of some inputs (stop - start, out). `zeros` and `scales` are (groups, out),
    and `groups` (in) gives the group of each input.
    """
    inputs, outputs = len(groups), scales.shape[1]
    unpacked = torch.empty(outputs, inputs, dtype=dtype)
    step = max(32, SLICE_BYTES // (4 * outputs) // 32 * 32)
    zeros, scales = zeros.float(), scales.float()
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        group = groups[start:stop]
        wide = values(start, stop).float()
        wide -= zeros[group]
        wide *= scales[group]
        unpacked[:, start:stop] = wide.T
    return unpacked


def unpack_experts(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a stack of experts in MXFP4: blocks (E, out, B, 16) and exponents (E, out, B) to (E, 32 B, out)."""
    experts, outputs, count, half = blocks.shape
    unpacked = torch.empty(experts, 2 * half * count, outputs, dtype=dtype)
    step = max(1, SLICE_BYTES // (8 * half * count))
    for expert in range(experts):
        for start in range(0, outputs, step):
            rows = expert, slice(start, start + step)
            values = fp4_pairs(blocks[rows]) * scale_values(scales[rows])[..., None]
            unpacked[expert, :, start : start + step] = values.flatten(1).T
    return unpacked
