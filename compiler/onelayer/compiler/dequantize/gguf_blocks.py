"""Blocks of the common GGUF types in, float32 out, in torch: half the time of the package gguf, and the same bits.

Layouts: ggml-common.h of llama.cpp. Types that are not in `BLOCKS` are left to the package, which unpacks them about as
fast. `tests/compiler/dequantize/test_gguf_blocks.py` compares every type with it.
"""

from collections.abc import Callable

import torch

# Whole numbers (n, groups, size), their scales (n, groups, 1), and what is added to the products, shaped as scales.
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def unpack_blocks(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """Unpack `blocks` (n, bytes of a block) of type `name` to float32 (n, values of a block)."""
    numbers, scales, added = BLOCKS[name](blocks)
    values = numbers.float()
    values *= scales
    if added is not None:
        values += added
    return values.flatten(1)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the 16-bit float at `start` of every block, (n, 1, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()[:, None]


def _shifted(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Unpack numbers of `bits` from bytes (n, bytes) to (n, groups, size).

    A run of `size` bytes makes 8 / `bits` groups; the first takes the lowest bits of every byte.
    """
    # Shifts of bytes are not vectorized, those of 8 bytes at once are.
    words = packed.contiguous().view(torch.int64).view(len(packed), -1, size // 8)
    mask = ((1 << bits) - 1) * 0x0101010101010101
    levels = [(words >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(levels, 2).view(torch.uint8).flatten(1, 2)


def _nibbles(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return _shifted(blocks[:, start:], 4, 16).view(-1, 1, 32)


def _centered(numbers: torch.Tensor, center: int) -> torch.Tensor:
    return numbers.view(torch.int8).sub_(center)


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _centered(_nibbles(blocks, 2), 8), _halves(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks, 4), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[:, None, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and negative minima of 8 groups, (n, 8, 1).

    Bytes 4 to 16 hold 16 numbers of 6 bits; the floats at 0 and 2 multiply them.
    """
    scales, minima, high = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([scales & 63, (high & 15) | ((scales >> 2) & 48)], 1)
    minima = torch.cat([minima & 63, (high >> 4) | ((minima >> 2) & 48)], 1)
    return _halves(blocks, 0) * scales[..., None].float(), -(_halves(blocks, 2) * minima[..., None].float())


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _shifted(blocks[:, 16:], 4, 32), *_scales_and_minima(blocks)


def _q5_k(blocks: torch.Tensor) -> Parts:
    fifth = _shifted(blocks[:, 16:48], 1, 32) << 4
    return _shifted(blocks[:, 48:], 4, 32) | fifth, *_scales_and_minima(blocks)


def _q6_k(blocks: torch.Tensor) -> Parts:
    low = _shifted(blocks[:, :128], 4, 64).view(-1, 16, 16)
    high = _shifted(blocks[:, 128:192], 2, 32).view(-1, 16, 16) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)[..., None].float() * _halves(blocks, 208)
    return _centered(low | high, 32), scales, None


BLOCKS: dict[str, Callable[[torch.Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
