"""The correction of one linear: every formula compared with its dense form."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onelayer.compiler.correct import correction
from onelayer.compiler.correct.correction import Correction, Gap, Oblique, measure_gap, split_product


def random_linear(
    out_features: int, in_features: int, rank: int, adapter_rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, up, down = normal(out_features, in_features), normal(out_features, rank), normal(rank, in_features)
    return weight, up, down, normal(adapter_rank, in_features), normal(out_features, adapter_rank)


def correct_linear(
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    limit: float | None,
) -> Correction:
    return measure_gap([weight], up, down, a, b, scaling).limited(limit)


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))


@settings(max_examples=60)
@given(sizes=sizes, scaling=st.floats(0.01, 8))
def test_without_limit_it_is_the_closed_form(sizes: tuple[int, int, int, int, int], scaling: float) -> None:
    weight, up, down, a, b = random_linear(*sizes)
    found = correct_linear(weight, up, down, a, b, scaling, None)
    projector = a.T @ torch.linalg.pinv(a.T)  # P P^T, onto the row space of A
    eye = torch.eye(len(projector), dtype=torch.float64)
    wanted = weight @ (eye - projector) + up @ down @ projector + scaling * b @ a
    torch.testing.assert_close(weight + found.b @ found.a, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(len(found.a), dtype=torch.float64), rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(sizes=sizes, scaling=st.floats(0.01, 8), limit=st.floats(0, 10))
def test_with_a_limit_it_is_the_paper_direction_by_direction(
    sizes: tuple[int, int, int, int, int], scaling: float, limit: float
) -> None:
    weight, up, down, a, b = random_linear(*sizes)
    found = correct_linear(weight, up, down, a, b, scaling, limit)
    p, b_split = split_product(a, b, scaling)
    torch.testing.assert_close(b_split @ p.T, scaling * b @ a, rtol=1e-9, atol=1e-9)
    error = (weight - up @ down) @ p
    clamped = 0
    for i in range(p.shape[1]):
        ratio = error[:, i].abs().mean() / b_split[:, i].abs().mean()
        clamped += bool(ratio > limit)
        wanted = b_split[:, i] - error[:, i] * min(1.0, limit / float(ratio))
        torch.testing.assert_close(found.b[:, i], wanted, rtol=1e-6, atol=1e-8)
    assert found.clamped == clamped


def oblique_gap(
    span: Gap,
    rows: Iterable[torch.Tensor],
    up: torch.Tensor,
    down: torch.Tensor,
    seen: torch.Tensor,
    transposed: bool = False,
) -> Gap:
    oblique = Oblique.of(span, seen)
    assert oblique is not None
    return oblique.gap(oblique.missed(rows, up, down, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_blocks_of_rows_change_nothing(
    transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, up, down, a, b = random_linear(11, 7, 3, 2)
    weight = weight.to(dtype)
    whole = measure_gap([weight.double()], up, down, a, b, 2.0)
    monkeypatch.setattr(correction, "BLOCK_BYTES", 100)
    stored = weight.T.contiguous() if transposed else weight
    found = measure_gap(stored.split(3), up, down, a, b, 2.0, transposed)
    torch.testing.assert_close(found.there(found.error).error, whole.error, rtol=1e-5, atol=1e-5)
    exact = dtype is torch.float64
    torch.testing.assert_close(found.b, whole.b, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5)


def test_an_exact_emulator_leaves_the_product_alone() -> None:
    weight, _, _, a, b = random_linear(6, 8, 1, 3)
    found = correct_linear(weight, weight, torch.eye(8, dtype=torch.float64), a, b, 0.5, None)
    torch.testing.assert_close(found.b @ found.a, 0.5 * b @ a)


def test_directions_that_a_lacks_are_not_invented() -> None:
    weight, up, down, a, b = random_linear(6, 8, 2, 4)
    a[1] = 2 * a[0]
    a[3] = 0
    found = correct_linear(weight, up, down, a, b, 1.0, None)
    assert found.a.shape == (2, 8)
    projector = a.T @ torch.linalg.pinv(a.T, rtol=1e-9)
    torch.testing.assert_close(weight + found.b @ found.a, weight - (weight - up @ down) @ projector + b @ a)


@pytest.mark.parametrize("limit", [3.0, None])
def test_zeros_give_finite_numbers(limit: float | None) -> None:
    weight, up, down, a, b = random_linear(5, 4, 2, 3)
    untrained = correct_linear(weight, up, down, a, torch.zeros_like(b), 1.0, limit)
    expected = (
        torch.zeros(5, 4).double() if limit is not None else (up @ down - weight) @ (a.T @ torch.linalg.pinv(a.T))
    )
    torch.testing.assert_close(untrained.b @ untrained.a, expected)
    empty = correct_linear(weight, up, down, torch.zeros_like(a), b, 1.0, limit)
    assert empty.a.shape == (0, 4)
    assert empty.b.shape == (5, 0)


@settings(max_examples=40)
@given(sizes=sizes, scaling=st.floats(0.01, 8), transposed=st.booleans())
def test_the_oblique_solution_is_the_least_squares_one(
    sizes: tuple[int, int, int, int, int], scaling: float, transposed: bool
) -> None:
    weight, up, down, a, b = random_linear(*sizes)
    generator = torch.Generator().manual_seed(sizes[-1])
    x = torch.randn(60, weight.shape[1], generator=generator, dtype=torch.float64) * torch.linspace(
        0.2, 3, weight.shape[1], dtype=torch.float64
    )
    span = measure_gap([weight], up, down, a, b, scaling)
    stored = weight.T.contiguous() if transposed else weight
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(correction, "RIDGE", 0.0)
        found = oblique_gap(span, stored.split(3), up, down, x.T @ x @ span.p, transposed)
    wanted = torch.linalg.lstsq(x @ span.p, x @ (weight - up @ down).T).solution.T
    torch.testing.assert_close(found.error, wanted, rtol=1e-5, atol=1e-6)
    isotropic = oblique_gap(span, [weight], up, down, span.p * 7)
    torch.testing.assert_close(isotropic.error, span.error / (1 + correction.RIDGE), rtol=1e-6, atol=1e-9)


def test_where_nothing_was_seen_the_oblique_solution_is_the_span() -> None:
    weight, up, down, a, b = random_linear(5, 7, 2, 3)
    span = measure_gap([weight], up, down, a, b, 1.0)
    for seen in (torch.zeros_like(span.p), torch.full_like(span.p, torch.nan)):
        assert Oblique.of(span, seen) is None
