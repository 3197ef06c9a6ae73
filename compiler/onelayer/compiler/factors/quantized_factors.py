"""A linear and its best factors in, quantized factors out: each side absorbs the other's rounding. Pure.

Letters as in `factorize.py`: W (out x in), up (out x k), down (k x in), G = X^T X, C = Y^T Y.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.factors.expectations import LOOKING, Expectations, solve
from onelayer.compiler.factors.factorize import Factors
from onelayer.compiler.factors.moments import Moments, OutputWeights
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype

# Pulls `up` towards its earlier value, as a share of the mean energy of the directions of `down`.
RIDGE = 1e-4


@dataclass(frozen=True)
class QuantizedFactors:
    """Factors as stored: `up` (k, bytes of a row of out) is stored transposed, `down` is (k, bytes of a row of in).

    `errors` (k) are the relative output errors of every prefix, rounding included.
    """

    up: torch.Tensor
    down: torch.Tensor
    errors: torch.Tensor


@dataclass(frozen=True)
class QuantizedDense:
    """A whole weight as stored, (out, bytes of a row of in), and its relative output error, a number."""

    weight: torch.Tensor
    error: torch.Tensor


def quantize_factors(
    W: torch.Tensor,
    moments: Moments,
    factors: Factors,
    factor_dtype: FactorDtype,
    dtype: torch.dtype,
    weights: OutputWeights | None = None,
    expected: Expectations = LOOKING,
) -> QuantizedFactors:
    """Quantize the factors of W; the model uses them in its own `dtype`.

    After `up` is quantized, `down` is solved again: the least-squares fit of W to the new span of `up` is best for any
    input. After `down` is quantized, `up` is solved again in turn, which needs the moment of the inputs. Measured, this
    halves the squared error that quantizing adds; another round gains a tenth of that. `weights` and `expected` as in
    `factorize`.
    """
    if weights is not None:
        W, moments = weights.applied(W, moments)
    W = W.to(moments.gram.product_dtype)
    gram = moments.gram.total_FF.to(W)

    def used(quantized: torch.Tensor) -> torch.Tensor:
        """Return up (out, k) as the model uses it, weighted."""
        up = dequantize_matrix(quantized, W.shape[0], factor_dtype, dtype).to(W).T
        return up if weights is None else weights.weighted(up)

    up_quantized = quantize_matrix(factors.up.T, factor_dtype)
    up = used(up_quantized)
    projector = solve(_regular(up.T @ up), up.T, expected)
    exact = projector @ W
    down_quantized = quantize_matrix(exact, factor_dtype)
    down = dequantize_matrix(down_quantized, W.shape[1], factor_dtype, dtype).to(W)
    if moments.of_input:
        WG = W @ gram
        inner = down @ gram @ down.T
        # The ridge leaves directions that calibration hardly saw unchanged.
        ridge = RIDGE * inner.diagonal().mean() + torch.finfo(W.dtype).tiny
        seen = inner + ridge * torch.eye(len(inner), dtype=W.dtype, device=W.device)
        solved = solve(seen, down @ WG.T + ridge * up.T, expected)
        exact_up = solved if weights is None else weights.unweighted(solved.T).T
        up_quantized = quantize_matrix(exact_up, factor_dtype)
        up = used(up_quantized)
        cross, total = ((up.T @ WG) * down).sum(dim=1), (WG * W).sum()
    else:
        # X is known only through W, so the error from rounding `down` is estimated from the input's energy per feature.
        assert moments.input_energy is not None
        rounding = down - exact
        inner = projector @ gram @ projector.T + (rounding * moments.input_energy.to(W)) @ rounding.T
        cross, total = ((up.T @ gram) * projector).sum(dim=1), gram.trace()
    products = (up.T @ up) * inner
    kept = 2 * cross.cumsum(0) - (2 * products.tril().sum(dim=1) - products.diagonal()).cumsum(0)
    return QuantizedFactors(up_quantized, down_quantized, _relative(total - kept, factors.figures.energy))


def quantize_dense(
    W: torch.Tensor,
    moments: Moments,
    energy: torch.Tensor,
    factor_dtype: FactorDtype,
    dtype: torch.dtype,
    weights: OutputWeights | None = None,
) -> QuantizedDense:
    """Quantize W itself. An output moment does not know X, so the error is then estimated from the input's energy."""
    quantized, wide = quantize_matrix(W, factor_dtype), moments.gram.product_dtype
    E = W.to(wide) - dequantize_matrix(quantized, W.shape[1], factor_dtype, dtype).to(wide)
    E = E if weights is None else weights.weighted(E)
    if moments.of_input:
        lost = ((E @ moments.gram.total_FF.to(E)) * E).sum()
    else:
        assert moments.input_energy is not None
        lost = (E.square().sum(dim=0) * moments.input_energy.to(E)).sum()
    return QuantizedDense(quantized, _relative(lost, energy))


def output_energy(W: torch.Tensor, moments: Moments, weights: OutputWeights | None = None) -> torch.Tensor:
    """Compute ||X W^T||_F^2, a number in float64, without a spectrum."""
    if weights is not None:
        W, moments = weights.applied(W, moments)
    gram = moments.gram.total_FF
    return ((W.to(gram) @ gram) * W.to(gram)).sum() if moments.of_input else gram.trace()


def _regular(gram: torch.Tensor) -> torch.Tensor:
    """Set zeros on the diagonal to one. Columns of zeros stand for missing directions; their solution is then zero."""
    return gram + (gram.diagonal() == 0).to(gram).diag()


def _relative(lost: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    return torch.where(energy > 0, (lost.clamp_min(0.0) / energy.to(lost.dtype)).sqrt(), 0.0)
