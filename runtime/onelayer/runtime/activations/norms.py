"""Normalization layers, recognized by what they compute, whose backward pass needs the normalized tokens alone.

A norm is y = x̂ * scale + bias with x̂ = (x - mean) * r, r the inverse root mean square per token (inverse standard
deviation where the mean is subtracted). x̂ is kept compressed and r exactly. y is rebuilt from x̂ for the modules that
read it, and the gradient of x follows from x̂ and r. Nothing is divided by the weight, which may be zero.
Shapes: (..., n) for x, x̂ and y, (..., 1) for r.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from onelayer.compiler.factors.activation_factors import Compressed

_USUAL_EPSILONS = (1e-6, 1e-5)
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}  # of x̂'s size, which is 1; shorter floats get the next line
_SHORT_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Norm:
    """The form of a norm: whether the mean is subtracted, whether the scale is 1 + weight, and the epsilon."""

    centered: bool
    plus_one: bool
    epsilon: float

    @torch.no_grad()
    def normalize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x̂ in the precision of x, and r in float32 or better."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse).to(x.dtype), inverse

    def scale(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """Return the factor of x̂, if there is one."""
        return weight if weight is None or not self.plus_one else 1.0 + weight.float()


@dataclass(frozen=True)
class NormCopy:
    """The stored copy of a norm's output, which serves the norm's backward and the recomputation of its readers."""

    normalized: Compressed
    norm: Norm
    module: nn.Module
    dtype: torch.dtype

    @torch.no_grad()
    def rebuild(self) -> torch.Tensor:
        """Rebuild y from the approximate x̂."""
        y = self.normalized.rebuild()
        scale, bias = self.norm.scale(_parameter(self.module, "weight")), _parameter(self.module, "bias")
        y = y if scale is None else y * scale
        return (y if bias is None else y + bias).to(self.dtype)


@torch.no_grad()
def recognize(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Norm | None:
    """Return the norm that turns x into y by the module's parameters, or None.

    Tries all forms on the tensors of a real call, whatever the module's name: with and without the mean, weight and
    1 + weight, and every small number among its attributes as epsilon. A form that fits must fit one more call, on
    tokens shifted by their size. Tokens with zero mean do not distinguish the forms, and tokens that are normalized
    already fit a module that does not change them. The nearest form that fits is returned.
    """
    shape = (x.shape[-1],)
    parameters = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
    if next(module.children(), None) is not None or x.shape != y.shape or not x.is_floating_point():
        return None
    if not parameters.keys() <= {"weight", "bias"} or any(size != shape for size in parameters.values()):
        return None
    # A norm in float32 rounds to the precision of x on the way.
    tolerance = max(_TOLERANCE.get(dtype, _SHORT_TOLERANCE) for dtype in (x.dtype, y.dtype))
    for forms in _forms(module, x.dtype):
        if all(_error(form, module, x, y) >= tolerance for form in forms):
            continue
        shifted = x + x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        calls = [(x, y), (shifted, module.forward(shifted))]
        errors = {form: max(_error(form, module, *call) for call in calls) for form in forms}
        nearest = min(errors, key=errors.__getitem__)
        if errors[nearest] < tolerance:
            return nearest
    return None


def _forms(module: nn.Module, dtype: torch.dtype) -> list[list[Norm]]:
    """List the forms to try for tokens of `dtype`: epsilons among the module's attributes first, then usual ones."""
    if type(module).forward is nn.LayerNorm.forward:
        return [[Norm(centered=True, plus_one=False, epsilon=module.eps)]]  # type: ignore[arg-type]
    named = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value <= 1e-2]
    # Torch's own RMSNorm uses the machine epsilon by default.
    hidden = [*_USUAL_EPSILONS, torch.finfo(torch.float32).eps, torch.finfo(dtype).eps]
    flags = (False, True)
    return [
        [Norm(centered, plus_one, epsilon) for epsilon in epsilons for centered in flags for plus_one in flags]
        for epsilons in (dict.fromkeys(named), dict.fromkeys(hidden))
    ]


def _error(norm: Norm, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the largest difference between y and the output of `norm`, relative to the largest entry of y."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normalized, _ = norm.normalize(x.to(wide))
    scale, bias = norm.scale(_parameter(module, "weight")), _parameter(module, "bias")
    expected = normalized if scale is None else normalized * scale
    expected = expected if bias is None else expected + bias
    largest = y.abs().max().item()
    error = (expected - y).abs().max().item() / largest if largest else math.inf
    return error if math.isfinite(error) else math.inf


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, torch.Tensor) else None


class CompressedNorm(torch.autograd.Function):
    """The module's own forward, and a backward from the compressed x̂ and the exact r."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        forward: Callable[[torch.Tensor], torch.Tensor],
        norm: Norm,
        normalized: Compressed,
        inverse: torch.Tensor,
    ) -> torch.Tensor:
        """Return y, bit for bit as the module computes it."""
        ctx.norm, ctx.normalized, ctx.inverse = norm, normalized, inverse
        ctx.save_for_backward(weight)
        ctx.x_dtype = x.dtype
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of x, and of weight and bias if they are trained."""
        (weight,) = ctx.saved_tensors
        norm: Norm = ctx.norm
        wide = gradient.to(ctx.inverse.dtype)
        normalized = ctx.normalized.rebuild().to(wide.dtype)
        leading = tuple(range(gradient.ndim - 1))
        weight_gradient = (wide * normalized).sum(leading).to(weight.dtype) if ctx.needs_input_grad[1] else None
        bias_gradient = wide.sum(leading).to(gradient.dtype) if ctx.needs_input_grad[2] else None
        x_gradient = None
        if ctx.needs_input_grad[0]:
            scale = norm.scale(weight)
            wide = wide if scale is None else wide * scale
            inner = wide - normalized * (wide * normalized).mean(-1, keepdim=True)
            inner = inner - wide.mean(-1, keepdim=True) if norm.centered else inner
            x_gradient = (inner * ctx.inverse).to(ctx.x_dtype)
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None
