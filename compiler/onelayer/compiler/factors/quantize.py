"""Matrices in, rows of bytes out, and back: the quantized forms of an emulator's factors.

A quantized matrix is uint8 (rows, row_bytes). Each row holds the codes of its values, padded with zeros to whole blocks
of 64, then one bfloat16 scale per block. Rows are independent: quantizing the first rows gives the first quantized
rows. No cast of a model changes the bytes, and no second tensor is needed. `int8`: code * scale / 127. `nf4`: the 16
levels of QLoRA (arXiv 2305.14314), two codes a byte, by bitsandbytes. `bf16`: the values, without scales.
"""

import logging
from typing import Any

import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import BLOCK, INSTALL, SCALE_BYTES, FactorDtype, is_blockwise

LEVELS = 127
LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")


def check_library(factor_dtype: FactorDtype | None) -> None:
    """Raise `InputError` if the library that `factor_dtype` needs is missing."""
    if factor_dtype == "nf4":
        _library()


def quantize_matrix(matrix: torch.Tensor, factor_dtype: FactorDtype) -> torch.Tensor:
    """Quantize a floating-point matrix (rows, width) to uint8 (rows, row_bytes)."""
    rows, width = matrix.shape
    if not is_blockwise(factor_dtype):
        return matrix.to(torch.bfloat16).contiguous().view(torch.uint8)
    values = torch.nn.functional.pad(matrix.to(torch.float32), (0, -width % BLOCK)).reshape(-1, BLOCK)
    if factor_dtype == "int8":
        # The scale is rounded first, so that the codes fit the scale that is stored.
        scales = values.abs().amax(dim=1, keepdim=True).to(torch.bfloat16)
        divisor = scales.float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
        codes = (values / divisor).round().clamp(-LEVELS, LEVELS).to(torch.int8).view(torch.uint8)
    else:
        codes, state = _library().quantize_4bit(values.contiguous(), blocksize=BLOCK, quant_type=factor_dtype)
        scales = state.absmax.to(torch.bfloat16)
    return torch.cat([codes.reshape(rows, -1), scales.reshape(rows, -1).view(torch.uint8)], dim=1)


def dequantize_matrix(
    quantized: torch.Tensor, width: int, factor_dtype: FactorDtype, dtype: torch.dtype
) -> torch.Tensor:
    """Turn uint8 (rows, row_bytes) back into a matrix (rows, width) of a floating-point `dtype`."""
    rows = len(quantized)
    if not is_blockwise(factor_dtype):
        return quantized.contiguous().view(torch.bfloat16).to(dtype)
    blocks = -(-width // BLOCK)
    scales = quantized[:, -blocks * SCALE_BYTES :].contiguous().view(torch.bfloat16)
    codes = quantized[:, : -blocks * SCALE_BYTES]
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
    """Import bitsandbytes' functions at first use: the import takes two seconds."""
    # It logs a hint about a kernel on the Hub, for a product that is not used here. Setting a level empties a cache in
    # every logger of the process, which takes a millisecond.
    if LOGGER.level != logging.ERROR:
        LOGGER.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        raise InputError(INSTALL) from None
    return bitsandbytes.functional
