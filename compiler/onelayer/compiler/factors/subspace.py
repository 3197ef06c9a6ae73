"""The leading eigenvectors of a positive semi-definite matrix in float32, with a bound on what they miss; pure.

Subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations
using Chebyshev-filtered subspace iteration", 2006), almost all of it matrix products, where a full eigensolver is not.
"""

import math

import torch

# Directions carried beyond those wanted, as a share of them and at least so many.
OVERSAMPLING, LEAST_OVERSAMPLING = 0.25, 8
MOST_CYCLES, HIGHEST_DEGREE = 8, 8
# A filter may amplify the first direction so many times more than the last wanted one: beyond it, the rounding of the
# first drowns the last.
MOST_SPREAD = 1e6
# A filter aims so many times below what is asked, lest a hair's breadth cost another cycle.
MARGIN = 30.0
# Measured: sums of products of float32 matrices miss the energy by less than this share, at any width.
ENERGY_ROUNDING = 1e-8


def block_width(rank: int) -> int:
    """How many directions are carried to find `rank` of them."""
    return rank + max(LEAST_OVERSAMPLING, int(OVERSAMPLING * rank))


def leading_eigenvectors(
    C: torch.Tensor, energy: float, rank: int, tolerance: float, rounding: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The `rank` leading eigenvectors (n, rank) and eigenvalues of C (n, n, float32) of trace `energy`, descending.

    They capture all that the best would but for `tolerance` of what the best leave, or the answer is None: it did not
    converge, or float32 does not resolve it. `rounding` is the error of C itself, in units of float32's epsilon of its
    largest eigenvalue. With residuals r_i, Ritz values t_i and a bound b on the eigenvalues outside the block, for
    which the smallest Ritz value stands, the missed energy is at most sum |r_i|^2 / (t_i - b) to second order. The
    start is random (`seed`), so the bound holds with the probability of a random block seeing every direction.
    """
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(len(C), block_width(rank), generator=generator).to(C)
    Q, _ = torch.linalg.qr(C @ Q)
    for _ in range(MOST_CYCLES):
        CQ = C @ Q
        values, vectors = torch.linalg.eigh(Q.T @ CQ)
        values, vectors = values.flip(0), vectors.flip(1)
        Q, CQ = Q @ vectors, CQ @ vectors
        edge, wanted = values[-1], values[:rank]
        residuals = (CQ[:, :rank] - Q[:, :rank] * wanted).square().sum(dim=0)
        gaps = wanted - edge
        floor = (rounding * torch.finfo(C.dtype).eps * float(values[0])) ** 2 * float((1 / gaps).sum())
        floor += ENERGY_ROUNDING * energy
        missed = floor + float((residuals / gaps).sum())
        lost = energy - float(wanted.sum(dtype=torch.float64))
        if missed <= tolerance * lost:
            return Q[:, :rank], wanted
        if not (edge > 0 and math.isfinite(missed) and floor <= tolerance * lost):
            return None
        growth = (2 * values / edge - 1).clamp_min(1.0).acosh()
        Q, _ = torch.linalg.qr(_filtered(C, Q, CQ, edge, _degree(growth[:rank], missed / (tolerance * lost))))
    return None


def _degree(growth: torch.Tensor, excess: float) -> int:
    """The filter's degree: what divides the missed energy by `excess`, no more than the spread allows.

    `growth` (rank) holds the logarithms of what one degree multiplies each wanted direction by.
    """
    first, last = float(growth[0]), float(growth[-1])
    needed = math.log(MARGIN * excess) / (2 * last) if last > 0 else HIGHEST_DEGREE
    allowed = math.log(MOST_SPREAD) / (first - last) if first > last else HIGHEST_DEGREE
    return max(1, min(math.ceil(needed), int(allowed), HIGHEST_DEGREE))


def _filtered(C: torch.Tensor, Q: torch.Tensor, CQ: torch.Tensor, edge: torch.Tensor, degree: int) -> torch.Tensor:
    """T(C) Q with the Chebyshev polynomial T of `degree` on [0, edge]: large beyond the edge, at most one before it."""
    before, now = Q, (2 / edge) * CQ - Q
    for _ in range(degree - 1):
        before, now = now, torch.sub((4 / edge) * (C @ now), now, alpha=2) - before
    return now


def symmetric_product(A: torch.Tensor, B: torch.Tensor, parts: int = 4) -> torch.Tensor:
    """A B^T (n x n) where it is known to be symmetric: blocks below the diagonal are copied, not computed."""
    n = len(A)
    C = A.new_empty(n, n)
    step = -(-n // parts)
    for start in range(0, n, step):
        end = min(start + step, n)
        C[start:end, start:] = A[start:end] @ B[start:].T
        C[end:, start:end] = C[start:end, end:].T
    return C
