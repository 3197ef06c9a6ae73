"""Conditions that nearly always hold, such as full rank: the host looks at them when many solutions are done. Pure.

A host that looks at a device's number waits until the device has caught up. A solution that expects its conditions to
hold is queued without a wait. Where one did not hold the solution is void, and is computed again by looking.
"""

import torch


class Expectations:
    """The conditions of one solution. With `looks` each decides where it arises; otherwise it is taken to hold."""

    def __init__(self, looks: bool = True) -> None:
        self.looks = looks
        self._taken: list[torch.Tensor] = []

    def holds(self, condition: torch.Tensor) -> bool:
        """Whether a condition, a bool of one value, holds or is taken to hold."""
        if self.looks:
            return bool(condition)
        self._taken.append(condition)
        return True

    @property
    def all_held(self) -> torch.Tensor | None:
        """Whether everything that was taken to hold does, on the device; None if nothing was."""
        return torch.stack(self._taken).all() if self._taken else None


# The host may look at any number: for callers that solve one problem.
LOOKING = Expectations()


def cholesky(A: torch.Tensor, expected: Expectations, upper: bool = False) -> torch.Tensor:
    """Compute the Cholesky factor of A (n, n). Raises `LinAlgError`, a `RuntimeError`, if it has none."""
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(A, upper=upper)
    return factor if expected.holds(failed == 0) else torch.linalg.cholesky(A, upper=upper)


def solve(A: torch.Tensor, B: torch.Tensor, expected: Expectations) -> torch.Tensor:
    """Compute the X (n, m) with A X = B. Raises `LinAlgError` if A (n, n) is singular."""
    solution: torch.Tensor
    solution, failed = torch.linalg.solve_ex(A, B)
    return solution if expected.holds(failed == 0) else torch.linalg.solve(A, B)
