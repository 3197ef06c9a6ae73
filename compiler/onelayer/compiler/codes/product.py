"""The product with a coded weight, differentiable in the codebook and the scales; no weight is kept for the way back.

Shape letters: N rows, O outputs, I inputs, d code width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

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
        return x @ decode_with(codes, codebook, scales, in_features).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, codebook, scales, in_features = ctx.codes, ctx.codebook, ctx.scales, ctx.in_features
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ decode_with(codes, codebook, scales, in_features).to(grad_y.dtype)
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
