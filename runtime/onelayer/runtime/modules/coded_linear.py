"""Linears whose weight is codes with a low-rank part: unpacked for one product at a time, never kept.

Shapes: N tokens, `in` and `out` the features of the replaced linear, k the rank of its residual factors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from onelayer.compiler.codes.encode import unpacked
from onelayer.compiler.codes.forms import CODEBOOK_ROWS, ENTRY_BYTES, CodeShape, code_row_bytes
from onelayer.compiler.codes.product import coded_product
from onelayer.compiler.emulators.facts import CODEBOOK, CODES, DOWN, UP
from onelayer.compiler.factors.stored_forms import row_bytes
from onelayer.runtime.modules.quantized_linear import PackedLinear, Quantization, quantized_product


def product_with_codes(
    x: torch.Tensor, held: Mapping[str, torch.Tensor], shape: tuple[int, int], bits: int, quantization: Quantization
) -> torch.Tensor:
    """Map (N, in) to (N, out) by codes of `bits` bits and residual factors, if there are any, by their endings."""
    out_features, in_features = shape
    dtype, coded = quantization.unpacked_dtype, unpacked(held[CODES], held[CODEBOOK], in_features, bits)
    used = replace(coded, codebook=coded.codebook.to(dtype), scales=coded.scales.to(dtype))
    y = coded_product(x, used, in_features)
    if UP in held:
        small = quantized_product(x, held[DOWN], in_features, quantization, True)
        y = y + quantized_product(small, held[UP], out_features, quantization, False)
    return y


class CodedLinear(PackedLinear):
    """y = x (scale * C[windows])^T + (x down^T) up^T + bias.

    `lr_codes` (out, bytes of a row) and `lr_codebook` (256, bytes of an entry) hold the codes; `lr_up` and `lr_down`,
    as in `QuantizedLinear`, what the codes leave out, if `rank` is not None. All are uint8. Only the input gets a
    gradient.
    """

    def __init__(self, code: CodeShape, rank: int | None, quantization: Quantization, **common: Any) -> None:
        out_features, in_features = common["out_features"], common["in_features"]
        sizes = {
            "lr_codes": (out_features, code_row_bytes(in_features, code)),
            "lr_codebook": (CODEBOOK_ROWS, ENTRY_BYTES * code.width),
        }
        if rank is not None:
            sizes["lr_up"] = (rank, row_bytes(out_features, quantization.factor_dtype))
            sizes["lr_down"] = (rank, row_bytes(in_features, quantization.factor_dtype))
        super().__init__(sizes, quantization, **common)
        self.code, self.rank = code, rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (N, in) to (N, out)."""
        held = {f".{name}": self.get_parameter(name) for name in self.factors}
        shape = (self.out_features, self.in_features)
        y = product_with_codes(self.cast(input), held, shape, self.code.bits, self.quantization)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank or 0}, bias={self.bias is not None}"
        return f"{sizes}, {self.code.bits} bits for {self.code.width}"
