"""Leading eigenvectors of a positive semi-definite matrix in float32, with a bound on the energy they miss. Pure.

Subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations
using Chebyshev-filtered subspace iteration", 2006). Almost all of it is matrix products; a full eigensolver is not.
"""

import math
from collections.abc import Sequence

import torch

from onelayer.compiler.factors.expectations import LOOKING, Expectations
from onelayer.compiler.machine.transfers import upload

# Extra directions carried along: a share of the wanted ones, and at least this many.
OVERSAMPLING, LEAST_OVERSAMPLING = 0.25, 8
MOST_CYCLES, HIGHEST_DEGREE = 8, 8
# A filter may amplify the first direction this many times more than the last wanted one. Above that, rounding of the
# first one hides the last one.
MOST_SPREAD = 1e6
# A filter aims this many times below the tolerance, so that a near miss does not cost another cycle.
MARGIN = 30.0
# Measured: sums of products of float32 matrices miss the energy by less than this share, at any width.
ENERGY_ROUNDING = 1e-8


def block_width(rank: int) -> int:
    """Return how many directions are carried to find `rank` of them."""
    return rank + max(LEAST_OVERSAMPLING, int(OVERSAMPLING * rank))


def leading_eigenvectors(
    C: torch.Tensor,
    energy: float | torch.Tensor,
    rank: int,
    tolerance: float,
    rounding: float | torch.Tensor,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the `rank` leading eigenvectors (n, rank) and eigenvalues of C (n, n) of trace `energy`, descending.

    Compared with the best, they miss at most `tolerance` of the energy that the best leave out. The result is None if
    the iteration does not converge, or if float32 cannot resolve it. `rounding` is the error of C itself, in units of
    float32's epsilon of its largest eigenvalue. Let r_i be residuals, t_i Ritz values, and b a bound on the eigenvalues
    outside the block, taken as the smallest Ritz value. Then the missed energy is at most sum |r_i|^2 / (t_i - b) to
    second order. The start is random (`seed`), so the bound holds with the probability that a random block has a part
    in every direction.

    A cycle waits for its small eigenproblem, whose kernel looks for failures, and once for the figures that decide
    whether another follows.
    """
    generator = torch.Generator().manual_seed(seed)
    Q = upload(torch.randn(len(C), block_width(rank), generator=generator).to(C.dtype), C.device)
    Q, _ = torch.linalg.qr(C @ Q)
    for _ in range(MOST_CYCLES):
        CQ = C @ Q
        values, vectors = torch.linalg.eigh(Q.T @ CQ)
        values, vectors = values.flip(0), vectors.flip(1)
        Q, CQ = Q @ vectors, CQ @ vectors
        edge, wanted = values[-1], values[:rank]
        residuals = (CQ[:, :rank] - Q[:, :rank] * wanted).square().sum(dim=0)
        gaps = wanted - edge
        growth = (2 * values / edge - 1).clamp_min(1.0).acosh()
        sums = [(1 / gaps).sum(), (residuals / gaps).sum(), wanted.sum(dtype=torch.float64)]
        figures = [energy, rounding, values[0], edge, *sums, growth[0], growth[rank - 1]]
        total, noise, largest, least, inverse_gaps, mixed, found, first, last = _read(figures)
        floor = (noise * torch.finfo(C.dtype).eps * largest) ** 2 * inverse_gaps
        floor += ENERGY_ROUNDING * total
        missed = floor + mixed
        lost = total - found
        if missed <= tolerance * lost:
            return Q[:, :rank], wanted
        if not (least > 0 and math.isfinite(missed) and floor <= tolerance * lost):
            return None
        Q, _ = torch.linalg.qr(_filtered(C, Q, CQ, edge, _degree(first, last, missed / (tolerance * lost))))
    return None


def certified_eigenvectors(
    C: torch.Tensor,
    energy: torch.Tensor,
    rank: int,
    tolerance: float,
    rounding: torch.Tensor,
    expected: Expectations = LOOKING,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find the same by a full solution in float32; None if float32 cannot resolve it.

    With the computed eigenvectors V, T = V^T C V is nearly diagonal. If only a wanted direction i and another j were
    mixed, the better one in their plane would gain exactly b^2 / (g / 2 + sqrt(g^2 / 4 + b^2)), with b = T_ij and
    g = T_ii - T_jj. The sum over all pairs is the missed energy to second order. The error of C itself counts as more
    of b, spread evenly over the other directions.
    """
    _, V = torch.linalg.eigh(C)
    V = V.flip(1)
    T = V.T @ (C @ V)
    values = T.diagonal()
    wanted, others = values[:rank], values[rank:]
    noise = ((rounding * torch.finfo(C.dtype).eps).to(C.dtype) * values[0]).square() / max(1, len(others))
    mixed = T[:rank, rank:].square() + noise
    half_gaps = (wanted[:, None] - others).clamp_min(0.0) / 2
    missed = (mixed / (half_gaps + (half_gaps.square() + mixed).sqrt())).sum(dtype=torch.float64)
    lost = energy - wanted.sum(dtype=torch.float64)
    return (V[:, :rank].contiguous(), wanted.clone()) if expected.holds(missed <= tolerance * lost) else None


def _read(numbers: Sequence[float | torch.Tensor]) -> list[float]:
    """Return numbers as the host knows them; it waits once for all tensors among them."""
    tensors = [number.to(torch.float64) for number in numbers if isinstance(number, torch.Tensor)]
    values = iter(torch.stack(tensors).tolist())
    return [next(values) if isinstance(number, torch.Tensor) else number for number in numbers]


def _degree(first: float, last: float, excess: float) -> int:
    """Choose the filter's degree: enough to divide the missed energy by `excess`, no more than the spread allows.

    `first` and `last` are the logarithms of the factors by which one degree amplifies the first and the last wanted
    direction.
    """
    needed = math.log(MARGIN * excess) / (2 * last) if last > 0 else HIGHEST_DEGREE
    allowed = math.log(MOST_SPREAD) / (first - last) if first > last else HIGHEST_DEGREE
    return max(1, min(math.ceil(needed), int(allowed), HIGHEST_DEGREE))


def _filtered(C: torch.Tensor, Q: torch.Tensor, CQ: torch.Tensor, edge: torch.Tensor, degree: int) -> torch.Tensor:
    """Compute T(C) Q with the Chebyshev polynomial T of `degree`: large above `edge`, at most one on [0, edge]."""
    before, now = Q, (2 / edge) * CQ - Q
    for _ in range(degree - 1):
        before, now = now, torch.sub((4 / edge) * (C @ now), now, alpha=2) - before
    return now


def symmetric_product(A: torch.Tensor, B: torch.Tensor, parts: int = 4) -> torch.Tensor:
    """Compute A B^T (n x n) that is known to be symmetric: blocks below the diagonal are copied."""
    n = len(A)
    C = A.new_empty(n, n)
    step = -(-n // parts)
    for start in range(0, n, step):
        end = min(start + step, n)
        C[start:end, start:] = A[start:end] @ B[start:].T
        C[end:, start:end] = C[start:end, end:].T
    return C
