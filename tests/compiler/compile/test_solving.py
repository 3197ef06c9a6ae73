"""What a linear takes for granted while the host does not look, and what is solved again."""

from functools import partial

import pytest
import torch

from onelayer.compiler.compile.solving import Solved, solve_all
from onelayer.compiler.emulators.facts import DOWN, UP
from onelayer.compiler.emulators.figures import LinearFigures
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.factorize import Method, factorize
from onelayer.compiler.factors.moments import Moments
from onelayer.compiler.machine.transfers import Arrivals

RANK = 6
# Nothing lies on it; for the solver it is a device whose numbers the host shall not look at.
DEVICE, HOST = torch.device("meta"), torch.device("cpu")


class Solver:
    """Factors weights by name from so many rows of inputs; counts how often each is solved, and by looking."""

    def __init__(self, rows: dict[str, int], breaks: str | None = None) -> None:
        self.rows, self.breaks = rows, breaks
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, name: str, expected: Expectations) -> Solved:
        self.calls.append((name, expected.looks))
        if name == self.breaks and not expected.looks:
            torch.linalg.cholesky(-torch.eye(2))
        generator = torch.Generator().manual_seed(len(name))
        W, X = (torch.randn(rows, 10, generator=generator).double() for rows in (12, self.rows[name]))
        moments = Moments.empty((12, 10), True, HOST, torch.float64)
        moments.add(X, None)
        found = factorize(W, moments, RANK, torch.float64, Method(expected=expected))
        return Solved(
            {UP: found.up, DOWN: found.down}, (found.figures, None, None), partial(LinearFigures.of, name, RANK)
        )


def test_what_did_not_hold_is_solved_again_with_the_same_result() -> None:
    rows = {"full": 40, "starved": 3, "known to be": 2, "breaking": 40}
    queued, looking = Solver(rows, breaks="breaking"), Solver(rows)
    found = solve_all(rows, queued, DEVICE, void={"known to be"})
    wanted = solve_all(rows, looking, HOST)
    assert queued.calls == [
        ("full", False), ("starved", False), ("known to be", True), ("breaking", False),
        ("breaking", True), ("starved", True),
    ]  # fmt: skip
    assert looking.calls == [(name, True) for name in rows]
    assert list(found) == list(wanted) == list(rows)
    for name, stored in wanted.items():
        assert found[name].figures == stored.figures
        assert all(torch.equal(found[name].tensors[ending], tensor) for ending, tensor in stored.tensors.items())
    assert found["starved"].figures.fallback is not None


def test_what_the_host_looks_at_fails_at_once() -> None:
    with pytest.raises(RuntimeError, match="cholesky"):
        solve_all(["one"], lambda name, expected: torch.linalg.cholesky(-torch.eye(2)), HOST)


def test_what_lies_on_the_host_has_arrived() -> None:
    value, arrivals = torch.ones(2), Arrivals()
    assert arrivals.begin({"a": value})["a"] is value
    arrivals.wait()
