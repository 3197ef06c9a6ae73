"""Linears whose factors or whole weight stay quantized: unpacked for one product at a time, never kept.

Shapes: N tokens, `in` and `out` the features of the replaced linear, k its rank, R the bytes of a quantized row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from onelayer.compiler.factors.quantize import dequantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype, row_bytes
from onelayer.runtime.modules.low_rank_linear import CompressedLinear
from onelayer.runtime.modules.weight_guard import GuardWeight


@dataclass(frozen=True)
class Quantization:
    """How the tensors of an emulator are quantized, and the dtype in which its figures and correction use them."""

    factor_dtype: FactorDtype
    unpacked_dtype: torch.dtype


class PackedLinear(CompressedLinear):
    """A linear of an emulator that is held as bytes: uint8 matrices, which casts of the model do not change."""

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        quantization: Quantization,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **common: Any,
    ) -> None:
        """Allocate a tensor for each of `sizes`, (rows, bytes) by name; `common` are the keywords of the base class."""
        super().__init__(device=device, dtype=dtype, **common)
        self.quantization, self.factors = quantization, tuple(sizes)
        self._compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, size in sizes.items():
            empty = torch.empty(*size, device=device, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nn.Linear declares a parameter
        """A guard with the shape and device of the missing weight, and the dtype that the model was last cast to."""
        shape = (self.out_features, self.in_features)
        return GuardWeight.like(self.get_parameter(self.factors[0]), shape, self._compute_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        """Apply moves and casts; a cast leaves the bytes unchanged and sets the dtype of the products."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.get_parameter(self.factors[0]).device
        self._compute_dtype = fn(torch.empty((), dtype=self._compute_dtype, device=device)).dtype
        return self

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Cast an input as autocast asks."""
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class QuantizedLinear(PackedLinear):
    """A linear of an emulator with quantized factors, or with its whole weight quantized if `rank` is None.

    `lr_up` (k, R of out) holds the rows of up^T, `lr_down` is (k, R of in); `lr_dense` is (out, R of in). Only the
    input gets a gradient.
    """

    def __init__(self, rank: int | None, quantization: Quantization, **common: Any) -> None:
        sides = {"lr_up": common["out_features"], "lr_down": common["in_features"]}
        rows = {"lr_dense": common["out_features"]} if rank is None else dict.fromkeys(sides, rank)
        widths = {"lr_dense": common["in_features"], **sides}
        sizes = {name: (count, row_bytes(widths[name], quantization.factor_dtype)) for name, count in rows.items()}
        super().__init__(sizes, quantization, **common)
        self.rank = rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (N, in) to (N, out), through k."""
        x = self.cast(input)
        if self.rank is None:
            y = self._product(x, "lr_dense", rows_are_outputs=True)
        else:
            y = self._product(self._product(x, "lr_down", rows_are_outputs=True), "lr_up", rows_are_outputs=False)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: torch.Tensor, name: str, rows_are_outputs: bool) -> torch.Tensor:
        width = self.out_features if name == "lr_up" else self.in_features
        return quantized_product(x, self.get_parameter(name), width, self.quantization, rows_are_outputs)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        rank = "full" if self.rank is None else self.rank
        sizes = f"in={self.in_features}, out={self.out_features}, rank={rank}, bias={self.bias is not None}"
        return f"{sizes}, {self.quantization.factor_dtype}"


def quantized_product(
    x: torch.Tensor, quantized: torch.Tensor, width: int, quantization: Quantization, rows_are_outputs: bool
) -> torch.Tensor:
    """Compute x M^T, or x M, for a quantized M (rows, width); only x gets a gradient."""
    y: torch.Tensor = _QuantizedProduct.apply(x, quantized, width, quantization, rows_are_outputs)  # type: ignore[no-untyped-call]
    return y


class _QuantizedProduct(torch.autograd.Function):
    """x M^T, or x M, for a quantized M (rows, width). Backward unpacks M again, so only its bytes are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantized: torch.Tensor,
        width: int,
        quantization: Quantization,
        rows_are_outputs: bool,
    ) -> torch.Tensor:
        # An attribute, not a saved tensor: hooks on saved tensors may compress or count activations.
        ctx.quantized, ctx.width, ctx.quantization, ctx.rows_are_outputs = (
            quantized,
            width,
            quantization,
            rows_are_outputs,
        )
        M = _dequantized(quantized, width, quantization, x.dtype)
        return x @ (M.T if rows_are_outputs else M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        M = _dequantized(ctx.quantized, ctx.width, ctx.quantization, grad_y.dtype)
        return grad_y @ (M if ctx.rows_are_outputs else M.T), None, None, None, None


def _dequantized(quantized: torch.Tensor, width: int, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """Return M (rows, width) in the dtype of a call, rounded to the dtype that the correction uses."""
    return dequantize_matrix(quantized, width, quantization.factor_dtype, quantization.unpacked_dtype).to(dtype)
