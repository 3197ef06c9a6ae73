"""Sums on a grid: the same bits in every order and grouping, and as precise as float64 sums."""

import pytest
import torch

from onelayer.compiler.factors.sum_grid import SumGrid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_and_grouping_of_terms_changes_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(5, 7, generator=generator, dtype=torch.float64).to(dtype) * 2**count for count in range(6)]
    grid = SumGrid(len(terms))
    first = grid.rounded(terms[0])
    one = first.clone()
    for term in terms[1:]:
        one += grid.rounded(term)

    other = SumGrid(len(terms), waits=True)
    assert grid.base is not None
    total = other.settle(float(grid.base), other.rounded(terms[4]))
    for index in (2, 5, 1, 3):
        total += other.rounded(terms[index])
    assert torch.equal(first + total, one)
    exact = torch.stack(terms).double().sum(dim=0)
    torch.testing.assert_close(one, exact, rtol=0, atol=1e-13 * float(exact.abs().max()))


def test_a_first_term_of_zeros_or_infinities_changes_no_later_one() -> None:
    for value in (0.0, float("inf"), float("nan")):
        grid = SumGrid()
        grid.rounded(torch.full((3,), value))
        term = torch.tensor([1e-3, 2.0, -3e5], dtype=torch.float64)
        torch.testing.assert_close(grid.rounded(term), term, rtol=1e-15, atol=0)
