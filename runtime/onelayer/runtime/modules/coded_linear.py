"""Linears whose weight is codes with a low-rank part: unpacked for one product at a time, never kept.

Shapes: N tokens, `in` and `out` the features of the replaced linear, k the rank of its residual factors.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from onelayer.compiler.codes.encode import decode, unpacked
from onelayer.compiler.codes.forms import CODEBOOK_ROWS, ENTRY_BYTES, CodeWidth, code_row_bytes
from onelayer.compiler.factors.stored_forms import row_bytes
from onelayer.runtime.modules.quantized_linear import PackedLinear, Quantization, quantized_product


class CodedLinear(PackedLinear):
    """y = x (scale * C[codes])^T + (x down^T) up^T + bias.

    `lr_codes` (out, bytes of a row) and `lr_codebook` (256, bytes of an entry) hold the codes; `lr_up` and `lr_down`,
    as in `QuantizedLinear`, what the codes leave out, if `rank` is not None. All are uint8. Only the input gets a
    gradient.
    """

    def __init__(self, width: CodeWidth, rank: int | None, quantization: Quantization, **common: Any) -> None:
        out_features, in_features = common["out_features"], common["in_features"]
        sizes = {
            "lr_codes": (out_features, code_row_bytes(in_features, width)),
            "lr_codebook": (CODEBOOK_ROWS, ENTRY_BYTES * width),
        }
        if rank is not None:
            sizes["lr_up"] = (rank, row_bytes(out_features, quantization.factor_dtype))
            sizes["lr_down"] = (rank, row_bytes(in_features, quantization.factor_dtype))
        super().__init__(sizes, quantization, **common)
        self.width, self.rank = width, rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (N, in) to (N, out)."""
        x = self.cast(input)
        dtype = self.quantization.unpacked_dtype
        y: torch.Tensor = _CodedProduct.apply(x, self.lr_codes, self.lr_codebook, self.in_features, dtype)  # type: ignore[no-untyped-call]
        if self.rank is not None:
            small = quantized_product(x, self.get_parameter("lr_down"), self.in_features, self.quantization, True)
            y = y + quantized_product(small, self.get_parameter("lr_up"), self.out_features, self.quantization, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank or 0}, bias={self.bias is not None}"
        return f"{sizes}, codes of {self.width}"


class _CodedProduct(torch.autograd.Function):
    """x W^T for a coded W (out, in). Backward unpacks W again, so only its bytes are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: nn.Parameter, codebook: nn.Parameter, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        # An attribute, not a saved tensor: hooks on saved tensors may compress or count activations.
        ctx.stored = codes, codebook, in_features, dtype
        return x @ _weight(codes, codebook, in_features, dtype).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_y @ _weight(*ctx.stored).to(grad_y.dtype), None, None, None, None


def _weight(codes: torch.Tensor, codebook: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return W (out, in) in the dtype that the correction uses."""
    return decode(unpacked(codes, codebook, in_features), in_features, dtype)
