"""Factors weighted by what the loss feels at the outputs: the optimum of a dense reference, quantized or not."""

from typing import Any

import pytest
import torch

from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.factors.factorize import factorize
from onelayer.compiler.factors.moments import Moments, OutputWeights
from onelayer.compiler.factors.quantize import dequantize_matrix
from onelayer.compiler.factors.quantized_factors import output_energy, quantize_dense, quantize_factors

RANK, BLOCK = 5, 16


def correlated(rows: int, features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator) * torch.logspace(0, -2, features)
    return torch.randn(rows, features, generator=generator) @ mixed


def dense_root(weights: OutputWeights, features: int) -> torch.Tensor:
    """Compute the whole of G^1/2 (out, out)."""
    return weights.weighted(torch.eye(features, dtype=torch.float64))


@pytest.fixture(params=[(40, 24), (24, 40)], ids=["by inputs", "by outputs"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    rows, columns = request.param
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x, g = correlated(300, columns, 2), correlated(300, rows, 3)
    moments = Moments.empty((rows, columns), rows >= columns, x.device, torch.float64)
    moments.add(x, x @ W.T)
    gradients = BlockGram(rows, x.device, BLOCK)
    gradients.add(g)
    weights = OutputWeights.of(gradients.blocks, rows)
    assert weights is not None
    return {"W": W, "moments": moments, "weights": weights, "x": x.double(), "root": dense_root(weights, rows)}


def lost(case: dict[str, Any], E: torch.Tensor) -> float:
    """Compute ||G^1/2 E X^T||_F^2."""
    return float((case["root"] @ E.double() @ case["x"].T).square().sum())


def test_the_roots_are_those_of_the_damped_blocks(case: dict[str, Any]) -> None:
    weights, size = case["weights"], len(case["W"])
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(weights.unweighted(weights.weighted(identity)), identity)
    G = torch.block_diag(*weights.G)[:size, :size]
    torch.testing.assert_close(case["root"] @ case["root"], G)
    assert float(G.diagonal().mean()) == pytest.approx(1.01)


def test_factors_are_the_optimum_under_both_sides(case: dict[str, Any]) -> None:
    W, moments, weights = case["W"], case["moments"], case["weights"]
    found = factorize(W, moments, RANK, torch.float32, weights=weights)
    singular = torch.linalg.svdvals(case["root"] @ W.double() @ case["x"].T)
    optimum = float(singular[RANK:].square().sum())
    assert lost(case, W - found.up @ found.down) == pytest.approx(optimum, rel=1e-3)
    assert float(found.figures.energy) == pytest.approx(float(singular.square().sum()), rel=1e-5)
    assert found.figures.error == pytest.approx((optimum / float(found.figures.energy)) ** 0.5, rel=1e-3)
    torch.testing.assert_close(found.figures.singular_values[:RANK].double(), singular[:RANK], rtol=1e-4, atol=1e-4)
    plain = factorize(W, moments, RANK, torch.float32)
    assert lost(case, W - plain.up @ plain.down) > 1.01 * optimum


def test_quantized_factors_are_nearly_as_good(case: dict[str, Any]) -> None:
    W, moments, weights = case["W"], case["moments"], case["weights"]
    factors = factorize(W, moments, RANK, torch.float32, weights=weights)
    stored = quantize_factors(W, moments, factors, "int8", torch.float32, weights)
    up = dequantize_matrix(stored.up, len(W), "int8", torch.float32).T
    down = dequantize_matrix(stored.down, W.shape[1], "int8", torch.float32)
    assert float(stored.errors[-1]) == pytest.approx(
        (lost(case, W - up @ down) / float(factors.figures.energy)) ** 0.5, rel=1e-3 if moments.of_input else 2e-2
    )
    assert factors.figures.error < float(stored.errors[-1]) < 1.05 * factors.figures.error
    energy = output_energy(W, moments, weights)
    assert float(energy) == pytest.approx(float(factors.figures.energy), rel=1e-5)
    dense = quantize_dense(W, moments, energy, "int8", torch.float32, weights)
    error = W - dequantize_matrix(dense.weight, W.shape[1], "int8", torch.float32)
    assert float(dense.error) == pytest.approx(
        (lost(case, error) / float(energy)) ** 0.5, rel=1e-3 if moments.of_input else 0.2
    )


def test_no_gradient_weighs_nothing() -> None:
    assert OutputWeights.of(None, 8) is None
    assert OutputWeights.of(torch.zeros(1, 8, 8, dtype=torch.float64), 8) is None
