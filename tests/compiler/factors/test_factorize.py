"""Moments and factors compared with their closed forms and the published method, in dense arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onelayer.compiler.factors.directions import Directions, all_directions
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.factorize import Factors, Method, factorize
from onelayer.compiler.factors.moments import Gram, Moments
from onelayer.compiler.factors.ranks import Spectrum, rank_for, ranks_by_spectrum
from onelayer.compiler.factors.subspace import leading_eigenvectors

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, features: int, seed: int = 1) -> torch.Tensor:
    decay = torch.logspace(0, -3, features, dtype=torch.float64)
    return random(rows, features, seed=seed) @ (random(features, features, seed=seed + 1) * decay)


def moments_of(W: torch.Tensor, X: torch.Tensor) -> Moments:
    """Gather what the hooks would gather for y = W x."""
    out_features, in_features = W.shape
    if out_features >= in_features:
        gram = Gram(in_features, CPU)
        gram.add(X)
        return Moments(gram, of_input=True)
    gram = Gram(out_features, CPU)
    gram.add(X @ W.T)
    return Moments(gram, of_input=False, input_energy=X.square().sum(dim=0))


def published(W: torch.Tensor, X: torch.Tensor, rank: int) -> torch.Tensor:
    """Factorize as SVD-LLM and EMLoC publish it: whiten with S, SVD of W S, cut, un-whiten with the inverse of S."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    S = vectors * values.clamp_min(1e-12).sqrt()
    U, s, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    W_k: torch.Tensor = (U[:, :rank] * s[:rank]) @ Vt[:rank] @ torch.linalg.inv(S)
    return W_k


def output_error(W: torch.Tensor, W_k: torch.Tensor, X: torch.Tensor) -> float:
    return float((X @ (W - W_k).T).norm() / (X @ W.T).norm())


def product(factors: Factors) -> torch.Tensor:
    return factors.up.double() @ factors.down.double()


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_factors_reach_the_published_optimum(shape: tuple[int, int], rank: int) -> None:
    W, X = random(*shape), correlated(500, shape[1])
    factors = factorize(W, moments_of(W, X), rank, torch.float64)
    singular = torch.linalg.svdvals(X @ W.T)
    optimum = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    assert factors.up.shape == (shape[0], rank)
    assert factors.down.shape == (rank, shape[1])
    assert output_error(W, product(factors), X) == pytest.approx(optimum, rel=1e-6)
    assert output_error(W, published(W, X, rank), X) == pytest.approx(optimum, rel=1e-6)
    assert factors.figures.error == pytest.approx(optimum, rel=1e-6)
    assert factors.figures.optimal_error == pytest.approx(optimum, rel=1e-6)
    torch.testing.assert_close(factors.figures.singular_values[:rank], singular[:rank], rtol=1e-6, atol=0)
    assert factors.figures.fallback is None


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 60), st.data())
def test_any_shape_gives_finite_factors_and_a_true_error(
    out_features: int, in_features: int, rows: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    W, X = random(out_features, in_features), random(rows, in_features, seed=rows)
    factors = factorize(W, moments_of(W, X), rank, torch.float64)
    assert torch.isfinite(product(factors)).all()
    assert factors.figures.error == pytest.approx(output_error(W, product(factors), X), rel=1e-5, abs=1e-6)
    assert factors.figures.optimal_error is not None
    assert factors.figures.error >= factors.figures.optimal_error - 1e-6


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)], ids=["square", "wide", "tall"])
def test_the_fast_solver_is_within_a_percent_and_claims_no_optimum(shape: tuple[int, int]) -> None:
    W, X = random(*shape), correlated(800, shape[1])
    moments, rank = moments_of(W, X), min(shape) // 8
    exact = factorize(W, moments, rank, torch.float64)
    fast = factorize(W, moments, rank, torch.float64, Method("fast", seed=3))
    assert fast.figures.optimal_error is None
    assert exact.figures.error <= output_error(W, product(fast), X) <= 1.01 * exact.figures.error
    assert fast.figures.error == pytest.approx(output_error(W, product(fast), X), rel=1e-4)
    assert float(fast.figures.energy) == pytest.approx(float(exact.figures.energy), rel=1e-5)
    torch.testing.assert_close(fast.up.T @ fast.up, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
    again = factorize(W, moments, rank, torch.float64, Method("fast", seed=3))
    assert torch.equal(fast.up, again.up)


def test_a_prefix_is_the_smaller_optimum() -> None:
    W, X = random(30, 20), correlated(300, 20)
    large = factorize(W, moments_of(W, X), 12, torch.float64)
    small = factorize(W, moments_of(W, X), 5, torch.float64)
    torch.testing.assert_close(large.up[:, :5] @ large.down[:5], product(small), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_the_error_of_rounded_factors_is_theirs_and_not_the_ideal_one(shape: tuple[int, int]) -> None:
    rank = min(shape) - 1
    W, X = random(shape[0], rank) @ random(rank, shape[1], seed=7), correlated(400, shape[1])
    factors = factorize(W, moments_of(W, X), rank, torch.bfloat16)
    assert factors.up.dtype == torch.bfloat16
    true = output_error(W, product(factors), X)
    assert factors.figures.optimal_error is not None
    assert true > 1.5 * factors.figures.optimal_error, "rounding should be visible here, or the test proves nothing"
    assert factors.figures.error == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_fewer_rows_than_features_spends_the_rest_on_the_weight(shape: tuple[int, int]) -> None:
    W, X = random(*shape), random(4, shape[1], seed=3)
    factors = factorize(W, moments_of(W, X), 9, torch.float64)
    assert factors.figures.fallback is not None
    assert "4 of 9" in factors.figures.fallback
    assert factors.figures.error < 1e-6
    seen = factors.up[:, :4] @ factors.down[:4]
    beyond = torch.linalg.svdvals(W - seen)
    assert float((W - product(factors)).norm()) == pytest.approx(float(beyond[5:].norm()), rel=1e-8)
    torch.testing.assert_close(factors.up.T @ factors.up, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_no_energy_at_all_is_plain_svd(shape: tuple[int, int]) -> None:
    W = random(*shape)
    factors = factorize(W, moments_of(W, torch.zeros(6, shape[1], dtype=torch.float64)), 4, torch.float64)
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(product(factors), (U[:, :4] * s[:4]) @ Vt[:4], rtol=1e-8, atol=1e-8)
    assert factors.figures.error == factors.figures.optimal_error == 0.0


def test_a_weight_of_zeros_and_dead_channels_stay_finite() -> None:
    X = correlated(50, 16)
    X[:, 3:9] = 0
    W = random(10, 16)
    W[2:7] = 0
    for weight in (W, torch.zeros(10, 16, dtype=torch.float64)):
        factors = factorize(weight, moments_of(weight, X), 6, torch.float64)
        assert torch.isfinite(product(factors)).all()
        assert output_error(weight + 1e-30, product(factors), X) < 1 + 1e-6


def test_non_finite_rows_are_dropped_and_counted() -> None:
    X = random(20, 6)
    X[3, 2], X[11, 0] = float("nan"), float("inf")
    gram = Gram(6, CPU)
    gram.add(X)
    kept = X[torch.isfinite(X).all(dim=1)]
    assert (gram.rows, gram.dropped_rows) == (20, 2)
    torch.testing.assert_close(gram.total_FF, kept.T @ kept)


@given(st.floats(0.01, 0.99), st.integers(1, 4096), st.integers(1, 4096))
def test_a_rank_never_costs_more_than_the_matrix(ratio: float, out_features: int, in_features: int) -> None:
    rank = rank_for(ratio, out_features, in_features)
    if rank is not None:
        assert 1 <= rank <= min(out_features, in_features)
        assert rank * (out_features + in_features) < out_features * in_features


def test_ranks_of_the_paper() -> None:
    assert (rank_for(0.4, 4096, 4096), rank_for(0.4, 4096, 14336)) == (819, 1274)


def spectra_of(shapes: dict[str, tuple[int, int]], decay: dict[str, float]) -> dict[str, Spectrum]:
    found = {}
    for name, (out_features, in_features) in shapes.items():
        values = [(k + 1) ** -decay[name] for k in range(min(out_features, in_features))]
        found[name] = Spectrum(out_features, in_features, values, sum(value * value for value in values))
    return found


def summed_error(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> float:
    return sum(
        1 - sum(v * v for v in item.singular_values[: ranks[name]]) / item.energy for name, item in spectra.items()
    )


def test_ranks_by_spectrum_spend_no_more_and_lose_less() -> None:
    shapes = {"flat": (64, 64), "steep": (64, 64), "tall": (128, 32), "wide": (32, 128)}
    spectra = spectra_of(shapes, {"flat": 0.1, "steep": 2.0, "tall": 0.5, "wide": 1.0})
    uniform = {name: rank_for(0.4, *shape) or 0 for name, shape in shapes.items()}
    chosen = ranks_by_spectrum(spectra, 0.4)
    weights = [sum(ranks[name] * sum(shapes[name]) for name in shapes) for ranks in (chosen, uniform)]
    assert weights[1] - max(map(sum, shapes.values())) < weights[0] <= weights[1]
    assert summed_error(spectra, chosen) < summed_error(spectra, uniform)
    assert chosen["steep"] < uniform["steep"]
    assert min(chosen.values()) >= 1


def test_ranks_by_spectrum_are_the_best_of_all_for_a_small_case() -> None:
    from itertools import product as every

    spectra = spectra_of({"a": (4, 4), "b": (4, 4)}, {"a": 0.3, "b": 1.5})
    budget = 8 * sum(rank_for(0.9, 4, 4) or 0 for _ in spectra)
    allowed = [ranks for ranks in every(range(1, 5), repeat=2) if 8 * sum(ranks) <= budget]
    best = min(allowed, key=lambda ranks: summed_error(spectra, dict(zip(spectra, ranks, strict=True))))
    assert tuple(ranks_by_spectrum(spectra, 0.9).values()) == best


LARGE = {"square": (288, 288), "wide": (256, 400), "tall": (400, 256)}


def dense_optimum(W: torch.Tensor, X: torch.Tensor, rank: int) -> float:
    energies = torch.linalg.svdvals(X @ W.T).square()
    return float((energies[rank:].sum() / energies.sum()).sqrt())


@pytest.fixture
def full_solves(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Record the shapes whose directions were all solved for."""
    seen: list[torch.Size] = []
    solve = all_directions

    def watched(W: torch.Tensor, moments: Moments, rank: int, expected: Expectations) -> Directions:
        seen.append(W.shape)
        return solve(W, moments, rank, expected)

    monkeypatch.setattr("onelayer.compiler.factors.factorize.all_directions", watched)
    return seen


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize(("decades", "rank"), [(0.05, 30), (1.5, 60), (3.0, 40)])
def test_iteration_agrees_with_the_dense_route_to_six_digits(
    kind: str, decades: float, rank: int, full_solves: list[torch.Size]
) -> None:
    shape = LARGE[kind]
    spread = torch.logspace(0, -decades, shape[1], dtype=torch.float64)
    W, X = random(*shape), (random(1200, shape[1], seed=1) * spread) @ random(shape[1], shape[1], seed=2)
    moments, optimum = moments_of(W, X), dense_optimum(W, X, rank)
    exact = factorize(W.float(), moments, rank, torch.float32)
    assert not full_solves, "the dense route would prove nothing"
    assert output_error(W, product(exact), X) == pytest.approx(optimum, rel=1e-6)
    assert output_error(W, published(W, X, rank), X) == pytest.approx(optimum, rel=1e-6)
    assert exact.figures.error == pytest.approx(optimum, rel=1e-6)
    assert not exact.figures.solved_again
    assert exact.figures.optimal_error == pytest.approx(optimum, rel=1e-6)
    torch.testing.assert_close(
        exact.figures.singular_values.double(), torch.linalg.svdvals(X @ W.T)[:rank], rtol=1e-4, atol=0
    )
    again = factorize(W.float(), moments, rank, torch.float32)
    assert torch.equal(exact.up, again.up)
    assert torch.equal(exact.down, again.down)
    fast = factorize(W.float(), moments, rank, torch.float32, Method("fast"))
    assert optimum * (1 - 1e-6) < output_error(W, product(fast), X) < 1.01 * optimum


@pytest.mark.parametrize("kind", LARGE)
def test_a_massive_channel_is_left_to_float64(kind: str, full_solves: list[torch.Size]) -> None:
    shape = LARGE[kind]
    W, X = random(*shape), random(1200, shape[1], seed=1)
    X[:, 7] *= 1e5  # the largest eigenvalue is over 1e7 times the others, which float32 cannot tell from its rounding
    factors = factorize(W.float(), moments_of(W.float().double(), X), 40, torch.float64)
    assert full_solves == [shape]
    assert factors.figures.solved_again
    optimum = dense_optimum(W.float().double(), X, 40)
    assert output_error(W.float().double(), product(factors), X) == pytest.approx(optimum, rel=1e-5)


@pytest.mark.parametrize("hard", ["close", "few", "steep"])
def test_what_iteration_cannot_certify_is_refused(hard: str) -> None:
    n, rank = 256, 40
    values = {
        "close": torch.linspace(1, 0.999, n, dtype=torch.float64),  # hardly a gap: too slow
        "few": (torch.arange(n) < 10).double(),  # fewer directions than are wanted
        "steep": torch.logspace(0, -60, n, dtype=torch.float64),  # beyond float32
    }[hard]
    Q, _ = torch.linalg.qr(random(n, n))
    C = (Q * values) @ Q.T
    assert leading_eigenvectors(C.float(), float(values.sum()), rank, 1e-6, 1.0, 0) is None


def test_a_certified_basis_captures_what_it_says() -> None:
    values = 1 / torch.arange(1, 301, dtype=torch.float64)
    Q, _ = torch.linalg.qr(random(300, 300))
    C = (Q * values) @ Q.T
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = leading_eigenvectors(C.float(), float(values.sum()), 50, tolerance, 1.0, 1)
        assert found is not None
        basis = torch.linalg.qr(found[0].double()).Q
        missed = values[:50].sum() - ((C @ basis) * basis).sum()
        assert -1e-9 <= float(missed) <= 1.5 * tolerance * float(values[50:].sum())  # a bound to second order
