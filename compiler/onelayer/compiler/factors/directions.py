"""Leading directions of a linear's output: left singular vectors of Y^T, from its moments. Pure.

Letters as in `factorize.py`: W (out x in), X (N x in) the calibration rows, Y = X W^T.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.factors.expectations import LOOKING, Expectations
from onelayer.compiler.factors.moments import Moments
from onelayer.compiler.factors.subspace import certified_eigenvectors, leading_eigenvectors, symmetric_product

# Eigenvalues below this share of the largest are rounding: of float64 sums, or of sums of float32 products.
CUTOFF = {torch.float64: 1e-12, torch.float32: 1e-7}


@dataclass(frozen=True)
class Directions:
    """Leading left singular vectors (out, <= rank) of Y^T, orthonormal, and squared singular values, descending.

    `energy`, a number in float64, is the sum of all squared singular values. `W` and `gram` (of the input or of the
    output) are in the solver's dtype.
    """

    W: torch.Tensor
    basis: torch.Tensor
    energies: torch.Tensor
    energy: torch.Tensor
    gram: torch.Tensor


def certified_directions(
    W: torch.Tensor,
    moments: Moments,
    rank: int,
    tolerance: float,
    seed: int,
    whole: bool,
    expected: Expectations = LOOKING,
) -> Directions | None:
    """Solve in float32 on the narrow side; return None if the tolerance is not certified.

    With `whole` all directions are solved for, otherwise a block iterates from a start seeded by `seed`.
    """

    def eigenvectors(
        C: torch.Tensor, energy: torch.Tensor, rounding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if whole:
            return certified_eigenvectors(C, energy, rank, tolerance, rounding, expected)
        return leading_eigenvectors(C, energy, rank, tolerance, rounding, seed)

    W, gram = W.to(torch.float32), moments.gram.total_FF.to(torch.float32)
    if not moments.of_input:
        energy = moments.gram.total_FF.trace()
        pairs = eigenvectors(gram, energy, torch.ones_like(energy))
        return None if pairs is None else Directions(W, *pairs, energy, gram)
    tall = W.shape[0] > W.shape[1]
    if tall:
        inner, S = symmetric_product(W.T, W.T), _root(gram, expected)
        energy = (inner * gram).sum(dtype=torch.float64)
        C = symmetric_product(S.T @ inner, S.T)
    else:
        WG = W @ gram
        energy = (WG * W).sum(dtype=torch.float64)
        C = symmetric_product(WG, W)
    if not expected.holds(energy > 0):
        return None
    # If inputs cancel in the outputs, the rounded values are larger than the values that remain.
    rounded = (W.square().sum(dim=0) * gram.diagonal()).sum(dtype=torch.float64) / energy
    pairs = eigenvectors(C, energy, rounded.clamp_min(1.0))
    if pairs is None:
        return None
    basis, energies = pairs
    if tall:
        rooted = S @ (basis / energies.sqrt())
        basis = W @ rooted
        R, failed = torch.linalg.cholesky_ex(basis.T @ basis)
        if not expected.holds(failed == 0):
            return None
        basis = torch.linalg.solve_triangular(R, basis.T, upper=False).T
        # The rounding of the root would show in the sixth digit of the energies, but not in the directions.
        projected = torch.linalg.solve_triangular(R, rooted.T @ inner, upper=False)
        energies = ((projected @ gram) * projected).sum(dim=1, dtype=torch.float64)
    return Directions(W, basis, energies, energy, gram)


def all_directions(W: torch.Tensor, moments: Moments, rank: int, expected: Expectations = LOOKING) -> Directions:
    """Solve the full eigenproblem in float64."""
    W, gram = W.to(torch.float64), moments.gram.total_FF
    cutoff = CUTOFF[moments.gram.product_dtype]
    if moments.of_input and W.shape[0] > W.shape[1]:
        basis, energies = basis_from_input(W, gram, rank, cutoff, expected)
    else:
        basis, energies = basis_from_output(W @ gram @ W.T if moments.of_input else gram)
    basis = basis[:, : determined(energies, rank, cutoff, expected)]
    return Directions(W, basis, energies, energies.sum().to(torch.float64), gram)


def basis_from_output(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute all eigenvectors (out, out) and eigenvalues of C = Y^T Y (out x out), descending.

    The kernel looks for failures, so the host waits for every full eigenproblem, here and below.
    """
    values, vectors = torch.linalg.eigh(C)
    return vectors.flip(1), values.flip(0).clamp_min(0.0)


def basis_from_input(
    W: torch.Tensor, G: torch.Tensor, rank: int, cutoff: float, expected: Expectations = LOOKING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute leading left singular vectors (out, <= rank) of W S and all its squared singular values; S S^T = G.

    V are eigenvectors of S^T W^T W S (in x in, the narrow side), U = W S V / s; no inverse of S is needed.
    """
    WS = W @ _root(G, expected)
    energies, V = torch.linalg.eigh(WS.T @ WS)
    energies, V = energies.flip(0).clamp_min(0.0), V.flip(1)
    kept = determined(energies, rank, cutoff, expected)
    return WS @ (V[:, :kept] / energies[:kept].sqrt()), energies


def _root(G: torch.Tensor, expected: Expectations) -> torch.Tensor:
    """Compute S (in x in) with S S^T = G: the Cholesky factor, or scaled eigenvectors if G is singular."""
    S: torch.Tensor
    S, failed = torch.linalg.cholesky_ex(G)
    if not expected.holds(failed == 0):
        values, vectors = torch.linalg.eigh(G)
        S = vectors * values.clamp_min(0.0).sqrt()
    return S


def determined(values: torch.Tensor, rank: int, cutoff: float, expected: Expectations) -> int:
    """Return how many of `rank` directions have eigenvalues, in descending order, that are above rounding."""
    if rank <= len(values) and expected.holds(values[rank - 1] > cutoff * values[0]):
        return rank
    return min(rank, numerical_rank(values, cutoff))


def numerical_rank(values: torch.Tensor, cutoff: float) -> int:
    """Count the leading eigenvalues, in descending order, that are above rounding."""
    return int((values > cutoff * values[0]).sum()) if len(values) and values[0] > 0 else 0
