"""Codes as bits in bytes, and the windows of eight bits in which each code stands last. Pure.

A row of S codes of `bits` bits is one string of bits: what stands before the first code, as many bits as fill its
window, then one code after the other. Window t starts at bit `bits` t. Shape letters: O rows, S codes of a row.
"""

import math

import torch

from onelayer.compiler.codes.forms import WINDOW_BITS

_AS_ONE = {4: torch.int32, 8: torch.int64}  # numbers that a codebook's row can be moved as, by their bytes


def windows(codes: torch.Tensor, bits: int, count: int, first: int = 0) -> torch.Tensor:
    """Return windows `first` to `first + count` of every row, uint8 (O, count), of codes in bytes (O, bytes)."""
    if bits == WINDOW_BITS:
        return codes[:, first : first + count]
    found = torch.empty(len(codes), count, dtype=torch.uint8, device=codes.device)
    # Windows that are `period` apart start at the same bit of a byte, `stride` bytes apart.
    period = math.lcm(bits, 8) // bits
    stride = period * bits // 8
    for number in range(min(period, count)):
        byte, shift = divmod((first + number) * bits, 8)
        own = found[:, number::period]
        starts = codes[:, byte::stride][:, : own.shape[1]]
        if shift == 0:
            own.copy_(starts)
        else:
            torch.bitwise_left_shift(starts, shift, out=own)
            own |= codes[:, byte + 1 :: stride][:, : own.shape[1]] >> (8 - shift)
    return found


def packed_windows(found: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes (O, bytes) that have these windows, uint8 (O, S), each of which begins as the last one ends."""
    rows = len(found)
    shifts = torch.arange(WINDOW_BITS - 1, -1, -1, device=found.device, dtype=torch.uint8)
    each = (found[:, :, None] >> shifts) & 1
    string = torch.cat([each[:, 0], each[:, 1:, WINDOW_BITS - bits :].reshape(rows, -1)], dim=1)
    string = torch.nn.functional.pad(string, (0, -string.shape[1] % 8)).reshape(rows, -1, 8)
    return (string << shifts).sum(dim=2, dtype=torch.uint8)


def looked_up(chosen: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the rows (..., d) of a codebook that windows (...) choose, without gradients.

    A row as large as a number is moved as one, in half the time.
    """
    whole = _AS_ONE.get(codebook.shape[1] * codebook.element_size())
    if whole is None:
        return torch.nn.functional.embedding(chosen.int(), codebook.detach())
    rows = codebook.detach().contiguous().view(whole).flatten().index_select(0, chosen.flatten().int())
    return rows.view(codebook.dtype).view(*chosen.shape, -1)
