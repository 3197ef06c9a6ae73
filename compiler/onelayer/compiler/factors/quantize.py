"""Matrices in, rows of bytes out, and back: the packed forms of an emulator's factors.

A packed matrix is uint8 (rows, row_bytes): each row holds the codes of its values, filled up with zeros to whole blocks
of 64, then one bfloat16 scale per block. So the first rows of a packed matrix are the packed first rows, no cast of a
model touches it, and it needs no second tensor. `int8`: code * scale / 127. `nf4`: the 16 levels of QLoRA
(arXiv 2305.14314), two codes a byte, packed and unpacked by bitsandbytes. `bf16`: the values, without scales.
"""

import logging
from typing import Any

import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import BLOCK, INSTALL, SCALE_BYTES, FactorDtype, is_blockwise

LEVELS = 127


def check_library(factor_dtype: FactorDtype | None) -> None:
    """Raise `InputError` where the library for `factor_dtype` is missing."""
    if factor_dtype == "nf4":
        _library()


def quantize_matrix(matrix: torch.Tensor, factor_dtype: FactorDtype) -> torch.Tensor:
    """(rows, width) floating -> uint8 (rows, row_bytes)."""
    rows, width = matrix.shape
    if not is_blockwise(factor_dtype):
        return matrix.to(torch.bfloat16).contiguous().view(torch.uint8)
    values = torch.nn.functional.pad(matrix.to(torch.float32), (0, -width % BLOCK)).reshape(-1, BLOCK)
    if factor_dtype == "int8":
        # Rounded first, so that codes fit the scale that is stored.
        scales = values.abs().amax(dim=1, keepdim=True).to(torch.bfloat16)
        divisor = scales.float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
        codes = (values / divisor).round().clamp(-LEVELS, LEVELS).to(torch.int8).view(torch.uint8)
    else:
        codes, state = _library().quantize_4bit(values.contiguous(), blocksize=BLOCK, quant_type=factor_dtype)
        scales = state.absmax.to(torch.bfloat16)
    return torch.cat([codes.reshape(rows, -1), scales.reshape(rows, -1).view(torch.uint8)], dim=1)


def dequantize_matrix(packed: torch.Tensor, width: int, factor_dtype: FactorDtype, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (rows, row_bytes) -> (rows, width) of a floating `dtype`."""
    rows = len(packed)
    if not is_blockwise(factor_dtype):
        return packed.contiguous().view(torch.bfloat16).to(dtype)
    blocks = -(-width // BLOCK)
    scales = packed[:, -blocks * SCALE_BYTES :].contiguous().view(torch.bfloat16)
    codes = packed[:, : -blocks * SCALE_BYTES]
    if factor_dtype == "int8":
        scaled = codes.contiguous().view(torch.int8).reshape(rows, blocks, BLOCK).to(torch.float32)
        values = scaled.mul_(scales.float().div(LEVELS)[:, :, None]).to(dtype)
    else:
        library = _library()
        state = library.QuantState(
            absmax=scales.float().flatten(),
            shape=torch.Size((rows, blocks * BLOCK)),
            blocksize=BLOCK,
            quant_type=factor_dtype,
            dtype=dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32,
        )
        values = library.dequantize_4bit(codes.reshape(-1, 1), state).to(dtype)
    return values.reshape(rows, blocks * BLOCK)[:, :width]


def _library() -> Any:
    """bitsandbytes' functions, imported at first use: it takes two seconds."""
    # It tells of a kernel on a hub, for a product that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        raise InputError(INSTALL) from None
    return bitsandbytes.functional
