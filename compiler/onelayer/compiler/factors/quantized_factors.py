"""One linear and its best factors in, the same packed out, each side's rounding absorbed by the other; pure.

Letters as in `factorize.py`: W (out x in), up (out x k), down (k x in), G = X^T X, C = Y^T Y.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.factors.factorize import Factors
from onelayer.compiler.factors.moments import Moments
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype

# Pulls `up` towards what it was, as a share of the mean energy of the directions of `down`.
RIDGE = 1e-4


@dataclass(frozen=True)
class QuantizedFactors:
    """Factors as stored: `up` (k, bytes of a row of out) is packed transposed, `down` (k, bytes of a row of in).

    `errors` (k): the relative output error of every prefix, roundings included.
    """

    up: torch.Tensor
    down: torch.Tensor
    errors: torch.Tensor


@dataclass(frozen=True)
class QuantizedDense:
    """A whole weight as stored, (out, bytes of a row of in), and its relative output error."""

    weight: torch.Tensor
    error: float


def quantize_factors(
    W: torch.Tensor, moments: Moments, factors: Factors, factor_dtype: FactorDtype, dtype: torch.dtype
) -> QuantizedFactors:
    """The `factors` of W, quantized; `dtype` is the model's, in which they are used.

    Once `up` is quantized, `down` is solved again: the least-squares fit of W to what `up` now spans, which is the best
    for any input. Once `down` is quantized, `up` is solved again, which needs the inputs' moment. This was measured to
    halve the squared error that quantizing adds. A further round gains a tenth of that.
    """
    W = W.to(moments.gram.product_dtype)
    gram = moments.gram.total_FF.to(W)
    up_quantized = quantize_matrix(factors.up.T, factor_dtype)
    up = dequantize_matrix(up_quantized, W.shape[0], factor_dtype, dtype).to(W).T
    projector = torch.linalg.solve(_regular(up.T @ up), up.T)
    exact = projector @ W
    down_quantized = quantize_matrix(exact, factor_dtype)
    down = dequantize_matrix(down_quantized, W.shape[1], factor_dtype, dtype).to(W)
    if moments.of_input:
        WG = W @ gram
        inner = down @ gram @ down.T
        # Directions that calibration hardly saw stay as they are.
        ridge = RIDGE * inner.diagonal().mean() + torch.finfo(W.dtype).tiny
        seen = inner + ridge * torch.eye(len(inner), dtype=W.dtype, device=W.device)
        up_quantized = quantize_matrix(torch.linalg.solve(seen, down @ WG.T + ridge * up.T), factor_dtype)
        up = dequantize_matrix(up_quantized, W.shape[0], factor_dtype, dtype).to(W).T
        cross, total = ((up.T @ WG) * down).sum(dim=1), (WG * W).sum()
    else:
        # X is known only through W, so the rounding of `down` is priced by the input's energy per feature.
        assert moments.input_energy is not None
        rounding = down - exact
        inner = projector @ gram @ projector.T + (rounding * moments.input_energy.to(W)) @ rounding.T
        cross, total = ((up.T @ gram) * projector).sum(dim=1), gram.trace()
    products = (up.T @ up) * inner
    kept = 2 * cross.cumsum(0) - (2 * products.tril().sum(dim=1) - products.diagonal()).cumsum(0)
    return QuantizedFactors(up_quantized, down_quantized, _relative(total - kept, factors.energy))


def quantize_dense(
    W: torch.Tensor, moments: Moments, energy: float, factor_dtype: FactorDtype, dtype: torch.dtype
) -> QuantizedDense:
    """W itself, packed. An output moment does not know X, so there the error is priced by the input's energy."""
    packed, wide = quantize_matrix(W, factor_dtype), moments.gram.product_dtype
    E = W.to(wide) - dequantize_matrix(packed, W.shape[1], factor_dtype, dtype).to(wide)
    if moments.of_input:
        lost = ((E @ moments.gram.total_FF.to(E)) * E).sum()
    else:
        assert moments.input_energy is not None
        lost = (E.square().sum(dim=0) * moments.input_energy.to(E)).sum()
    return QuantizedDense(packed, float(_relative(lost, energy)))


def output_energy(W: torch.Tensor, moments: Moments) -> float:
    """||X W^T||_F^2, without a spectrum."""
    gram = moments.gram.total_FF
    return float(((W.to(gram) @ gram) * W.to(gram)).sum() if moments.of_input else gram.trace())


def _regular(gram: torch.Tensor) -> torch.Tensor:
    """Columns of zeros, which stand for directions that are not there, count as any other: their solution is zero."""
    return gram + (gram.diagonal() == 0).to(gram).diag()


def _relative(lost: torch.Tensor, energy: float) -> torch.Tensor:
    return (lost.clamp_min(0.0) / energy).sqrt() if energy > 0 else torch.zeros_like(lost)
