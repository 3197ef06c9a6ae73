"""The product with a coded weight, differentiable in the codebook and the scales; no weight is kept for the way back.

Shape letters: N rows, O outputs, I inputs, d code width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from onelayer.compiler.codes import forms
from onelayer.compiler.codes.encode import decode_with
from onelayer.compiler.codes.forms import group_size


def coded_product(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Compute x W^T (..., O) for W = scale * C[codes] (O, I); gradients flow to x, the codebook and the scales.

    `codes` are bytes (O, ceil(I / d)). W is made again on the way back. x is kept only if the codebook or the scales
    need a gradient.
    """
    y: torch.Tensor = _CodedProduct.apply(x, codes, codebook, scales, in_features)  # type: ignore[no-untyped-call]
    return y


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor, in_features: int
    ) -> torch.Tensor:
        # Attributes, not saved tensors: hooks on saved tensors may compress or count activations.
        ctx.codes, ctx.codebook, ctx.scales, ctx.in_features = codes, codebook, scales, in_features
        if codebook.requires_grad or scales.requires_grad:
            ctx.save_for_backward(x)
        return _times_transposed(x, codes, codebook, scales, in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, codebook, scales, in_features = ctx.codes, ctx.codebook, ctx.scales, ctx.in_features
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _times(grad_y, codes, codebook, scales, in_features)
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return grad_x, None, None, None, None
        # The gradient of W, spread over the codebook's rows and the scales that made it.
        (x,), width = ctx.saved_tensors, codebook.shape[1]
        grad_W = grad_y.reshape(-1, len(codes)).T @ x.reshape(-1, in_features)
        group = group_size(in_features)
        by_group = grad_W * decode_with(codes, codebook, torch.ones_like(scales), in_features)
        grad_scales = torch.stack([part.sum(dim=1) for part in by_group.split(group, dim=1)], dim=1)
        spread = grad_W * scales.repeat_interleave(group, dim=1)[:, :in_features]
        entries = torch.nn.functional.pad(spread, (0, -in_features % width)).reshape(-1, width)
        # On a CPU `scatter_add_` takes a sixth of the time of `index_add_`.
        rows = codes.long().reshape(-1, 1).expand(-1, width)
        grad_codebook = torch.zeros_like(codebook).scatter_add_(0, rows, entries.to(codebook.dtype))
        return grad_x, None, grad_codebook, grad_scales.to(scales.dtype), None


def _times_transposed(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Compute x W^T, decoding some rows of W at a time."""
    step = max(1, forms.DECODED_VALUES // in_features)
    if step >= len(codes):
        return x @ decode_with(codes, codebook, scales, in_features).to(x.dtype).T
    y = x.new_empty(*x.shape[:-1], len(codes))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        y[..., rows] = x @ decode_with(codes[rows], codebook, scales[rows], in_features).to(x.dtype).T
    return y


def _times(
    grad_y: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Compute grad_y W, decoding some columns of W at a time, which share a scale."""
    if codes.shape[0] * in_features <= forms.DECODED_VALUES:
        return grad_y @ decode_with(codes, codebook, scales, in_features).to(grad_y.dtype)
    width, group = codebook.shape[1], group_size(in_features)
    step = width * max(1, forms.DECODED_VALUES // len(codes) // width)
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features)
    for first in range(0, in_features, group):
        end = min(first + group, in_features)
        for start in range(first, end, step):
            stop = min(start + step, end)
            own = codes[:, start // width : -(-stop // width)]
            scale = scales[:, first // group : first // group + 1]
            decoded = decode_with(own, codebook, scale, stop - start)
            grad_x[..., start:stop] = grad_y @ decoded.to(grad_y.dtype)
    return grad_x
