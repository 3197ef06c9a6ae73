"""Linears whose factors, or whose whole weight, stay packed: unpacked for the moment of a product, never kept.

Shapes: N tokens, `in` and `out` the features of the linear that was replaced, k its rank, R the bytes of a packed row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from onelayer.compiler.factors.quantize import unpack
from onelayer.compiler.factors.stored_forms import FactorDtype, row_bytes
from onelayer.runtime.modules.low_rank_linear import CompressedLinear
from onelayer.runtime.modules.weight_guard import GuardWeight


@dataclass(frozen=True)
class Packing:
    """How the tensors of an emulator are packed, and the dtype that its figures and its correction take them in."""

    kind: FactorDtype
    unpacked_dtype: torch.dtype


class PackedLinear(CompressedLinear):
    """A linear of an emulator with packed factors, or with its whole weight packed where `rank` is None.

    `lr_up` (k, R of out), the rows of up^T, and `lr_down` (k, R of in); or `lr_dense` (out, R of in). All uint8, which
    no cast of the model touches. Gradients reach the input alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None,
        packing: Packing,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        was_conv1d: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, was_conv1d)
        self.rank, self.packing = rank, packing
        self._compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        self.factors = ("lr_dense",) if rank is None else ("lr_up", "lr_down")
        for name in self.factors:
            rows, width = (out_features if rank is None else rank), self._width(name)
            empty = torch.empty(rows, row_bytes(width, packing.kind), device=device, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nn.Linear declares a parameter
        """A guard: shape and device of the weight that is not there, and the dtype that the model was last cast to."""
        shape = (self.out_features, self.in_features)
        return GuardWeight.like(self.get_parameter(self.factors[0]), shape, self._compute_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        """Casts, too, come by here; the bytes stay, and the dtype is remembered."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.get_parameter(self.factors[0]).device
        self._compute_dtype = fn(torch.empty((), dtype=self._compute_dtype, device=device)).dtype
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out), through k."""
        x = input
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.rank is None:
            y = self._product(x, "lr_dense", rows_are_outputs=True)
        else:
            y = self._product(self._product(x, "lr_down", rows_are_outputs=True), "lr_up", rows_are_outputs=False)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: torch.Tensor, name: str, rows_are_outputs: bool) -> torch.Tensor:
        return packed_product(x, getattr(self, name), self._width(name), self.packing, rows_are_outputs)

    def _width(self, name: str) -> int:
        return self.out_features if name == "lr_up" else self.in_features

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        rank = "full" if self.rank is None else self.rank
        sizes = f"in={self.in_features}, out={self.out_features}, rank={rank}, bias={self.bias is not None}"
        return f"{sizes}, {self.packing.kind}"


def packed_product(
    x: torch.Tensor, packed: torch.Tensor, width: int, packing: Packing, rows_are_outputs: bool
) -> torch.Tensor:
    """x M^T, or x M, for a packed M (rows, width); gradients reach x alone."""
    y: torch.Tensor = _PackedProduct.apply(x, packed, width, packing, rows_are_outputs)  # type: ignore[no-untyped-call]
    return y


class _PackedProduct(torch.autograd.Function):
    """x M^T, or x M, for a packed M (rows, width). Backward unpacks M again: nothing but its bytes is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, width: int, packing: Packing, rows_are_outputs: bool
    ) -> torch.Tensor:
        # An attribute and not a saved tensor: hooks on those are for activations, which they may compress or count.
        ctx.packed, ctx.width, ctx.packing, ctx.rows_are_outputs = packed, width, packing, rows_are_outputs
        M = _unpacked(packed, width, packing, x.dtype)
        return x @ (M.T if rows_are_outputs else M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        M = _unpacked(ctx.packed, ctx.width, ctx.packing, grad_y.dtype)
        return grad_y @ (M if ctx.rows_are_outputs else M.T), None, None, None, None


def _unpacked(packed: torch.Tensor, width: int, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """(rows, width) in the dtype of a call, by way of the one that the correction takes it in."""
    return unpack(packed, width, packing.kind, packing.unpacked_dtype).to(dtype)
