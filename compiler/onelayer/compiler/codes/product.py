"""The product with a coded weight, differentiable in the codebook and the scales; no weight is kept for the way back.

Shape letters: N rows, O outputs, I inputs, d code width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from onelayer.compiler.codes import forms
from onelayer.compiler.codes.encode import Coded, decode_with
from onelayer.compiler.codes.forms import group_size
from onelayer.compiler.codes.windows import windows


def coded_product(x: torch.Tensor, coded: Coded, in_features: int) -> torch.Tensor:
    """Compute x W^T (..., O) for W = scale * C[windows] (O, I); gradients flow to x, the codebook and the scales.

    W is made again on the way back. x is kept only if the codebook or the scales need a gradient.
    """
    codes, codebook, scales = coded.codes, coded.codebook, coded.scales
    y: torch.Tensor = _CodedProduct.apply(  # type: ignore[no-untyped-call]
        x, codes, codebook, scales, coded.bits, in_features
    )
    return y


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        codebook: torch.Tensor,
        scales: torch.Tensor,
        bits: int,
        in_features: int,
    ) -> torch.Tensor:
        # Attributes, not saved tensors: hooks on saved tensors may compress or count activations.
        ctx.coded, ctx.in_features = Coded(codes, scales, codebook, bits), in_features
        if codebook.requires_grad or scales.requires_grad:
            ctx.save_for_backward(x)
        return _times_transposed(x, ctx.coded, in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        coded, in_features = ctx.coded, ctx.in_features
        grad_x = _times(grad_y, coded, in_features) if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return grad_x, None, None, None, None, None
        (x,) = ctx.saved_tensors
        grad_W = grad_y.reshape(-1, len(coded.codes)).T @ x.reshape(-1, in_features)
        return grad_x, None, *_spread(grad_W, coded, in_features), None, None


def _spread(grad_W: torch.Tensor, coded: Coded, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread the gradient of W (O, I) over the codebook's rows and the scales that made it."""
    scales, codebook, width, group = coded.scales, coded.codebook, coded.codebook.shape[1], group_size(in_features)
    by_group = grad_W * decode_with(replace(coded, scales=torch.ones_like(scales)), in_features)
    grad_scales = torch.stack([part.sum(dim=1) for part in by_group.split(group, dim=1)], dim=1)
    spread = grad_W * scales.repeat_interleave(group, dim=1)[:, :in_features]
    entries = torch.nn.functional.pad(spread, (0, -in_features % width)).reshape(-1, width)
    chosen = windows(coded.codes, coded.bits, -(-in_features // width))
    # On a CPU `scatter_add_` takes a sixth of the time of `index_add_`.
    rows = chosen.long().reshape(-1, 1).expand(-1, width)
    grad_codebook = torch.zeros_like(codebook).scatter_add_(0, rows, entries.to(codebook.dtype))
    return grad_codebook, grad_scales.to(scales.dtype)


def _times_transposed(x: torch.Tensor, coded: Coded, in_features: int) -> torch.Tensor:
    """Compute x W^T, decoding some rows of W at a time."""
    step, count = max(1, forms.DECODED_VALUES // in_features), len(coded.codes)
    if step >= count:
        return x @ decode_with(coded, in_features).to(x.dtype).T
    y = x.new_empty(*x.shape[:-1], count)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = replace(coded, codes=coded.codes[rows], scales=coded.scales[rows])
        y[..., rows] = x @ decode_with(part, in_features).to(x.dtype).T
    return y


def _times(grad_y: torch.Tensor, coded: Coded, in_features: int) -> torch.Tensor:
    """Compute grad_y W, decoding some columns of W at a time, which share a scale."""
    count = len(coded.codes)
    if count * in_features <= forms.DECODED_VALUES:
        return grad_y @ decode_with(coded, in_features).to(grad_y.dtype)
    width, group = coded.codebook.shape[1], group_size(in_features)
    step = width * max(1, forms.DECODED_VALUES // count // width)
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features)
    for first in range(0, in_features, group):
        part = replace(coded, scales=coded.scales[:, first // group : first // group + 1])
        end = min(first + group, in_features)
        for start in range(first, end, step):
            stop = min(start + step, end)
            decoded = decode_with(part, stop - start, start // width)
            grad_x[..., start:stop] = grad_y @ decoded.to(grad_y.dtype)
    return grad_x
