"""A weight, its moments and a rank in, factors and their error out. Pure: tensors in, tensors and figures out.

Convention y = W x, W (out x in), X (N x in) the calibration rows, Y = X W^T. Wanted: the rank-k W_k that minimizes
||X W^T - X W_k^T||_F, the activation-aware SVD of SVD-LLM and EMLoC (arXiv 2506.12015, stage 1). Both routes below end
in W_k = U_k U_k^T W with orthonormal U_k, so nothing is inverted and W itself is never decomposed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from onelayer.compiler.factors.directions import (
    CUTOFF,
    all_directions,
    basis_from_input,
    basis_from_output,
    certified_directions,
    numerical_rank,
)
from onelayer.compiler.factors.expectations import LOOKING, Expectations
from onelayer.compiler.factors.moments import Moments, OutputWeights
from onelayer.compiler.factors.ranks import Solver
from onelayer.compiler.factors.subspace import block_width

# Both solvers look for the leading directions only, if these are few enough for that to be faster, and compute in
# float32. `exact` does so only for linears that are not small: a small one takes hardly any time in float64.
WORTHWHILE_SHARE, SMALL = 0.6, 256
# The extra loss allowed, as a share of the energy that the best factors lose: six digits of the error; half a percent.
TOLERANCE = {"exact": 1e-6, "fast": 1e-2}


@dataclass(frozen=True)
class Method:
    """How factors are solved for: `exact` gives the optimum to six digits, `fast` to half a percent.

    Where a solver iterates, it begins from a start seeded by `seed`.
    """

    solver: Solver = "exact"
    seed: int = 0
    expected: Expectations = LOOKING


BEST = Method()


class FactorFigures(NamedTuple):
    """What is known of factors of rank k; tensors stay on the solver's device until they are read.

    `lost` (of the factors as stored), `left_out` (by the best of this rank; None where the solver does not know all of
    the spectrum) and `energy` are sums of squares of the output over the calibration rows, numbers in float64.
    `singular_values` (descending, at least the k leading ones) are those of Y, `energy` the sum of all their squares.
    `fallback` says in words if calibration did not determine all of the factors. `solved_again`: in float64, because
    float32 did not certify the accuracy.
    """

    lost: torch.Tensor
    left_out: torch.Tensor | None
    singular_values: torch.Tensor
    energy: torch.Tensor
    fallback: str | None
    solved_again: bool

    @property
    def error(self) -> float:
        """The relative Frobenius error of the output over the calibration rows."""
        return _relative(float(self.lost), float(self.energy))

    @property
    def optimal_error(self) -> float | None:
        """The Eckart-Young bound sqrt(sum_{i>k} s_i^2 / sum s_i^2), if it is known."""
        return None if self.left_out is None else _relative(float(self.left_out), float(self.energy))


@dataclass(frozen=True)
class Factors:
    """W ~ up @ down with `up` (out, k) and `down` (k, in), ordered by energy: a prefix is the smaller optimum."""

    up: torch.Tensor
    down: torch.Tensor
    figures: FactorFigures


def factorize(
    W: torch.Tensor,
    moments: Moments,
    rank: int,
    dtype: torch.dtype,
    method: Method = BEST,
    fallback_moments: Callable[[], Moments] | None = None,
    weights: OutputWeights | None = None,
) -> Factors:
    """Compute the best rank-`rank` factors of W (out, in) under `moments`, stored in `dtype`.

    Both solvers compute in float32. If it does not certify the accuracy, all directions are solved for in float64.
    Figures computed in float32 are exact to about 1e-7 of the energy. If `moments` determine fewer directions than
    `rank`, the best ones of the rest of W under `fallback_moments` follow, and then those of the weight itself. So a
    prefix is still what a smaller rank would give. With `weights`, factors are the best for weighted outputs, and so
    are all figures. The host waits for conditions that the method looks at, for eigenproblems and for iterations.
    """
    if weights is not None:
        W, moments = weights.applied(W, moments)
    narrow, solver, expected = min(W.shape), method.solver, method.expected
    leading, is_few = None, block_width(rank) < WORTHWHILE_SHARE * narrow
    tried = narrow >= SMALL or (solver == "fast" and is_few)
    if tried:
        leading = certified_directions(W, moments, rank, TOLERANCE[solver], method.seed, not is_few, expected)
    iterated = leading is not None and solver == "fast"
    solved = leading or all_directions(W, moments, rank, expected)
    W, energies, energy, gram = solved.W, solved.energies, solved.energy, solved.gram
    basis, fallback = _completed(solved.basis, W, rank, CUTOFF[moments.gram.product_dtype], fallback_moments)
    basis = _with_fixed_signs(basis)
    projected = basis.T @ W
    up, down = (basis if weights is None else weights.unweighted(basis)).to(dtype), projected.to(dtype)
    used = up.to(W) if weights is None else weights.weighted(up.to(W))
    lost = _lost_energy(W, used, down.to(W), basis, projected, moments, gram, energy)
    left_out = None if iterated else energy - energies[:rank].sum(dtype=torch.float64)
    figures = FactorFigures(lost, left_out, energies.sqrt(), energy, fallback, tried and leading is None)
    return Factors(up, down, figures)


def _completed(
    basis: torch.Tensor,
    W: torch.Tensor,
    rank: int,
    cutoff: float,
    fallback_moments: Callable[[], Moments] | None,
) -> tuple[torch.Tensor, str | None]:
    """Extend `basis` to `rank` directions (out, rank), orthonormal or zero; say in words what gave the added ones."""
    determined = basis.shape[1]
    if determined == rank:
        return basis, None
    origins = []
    if fallback_moments is not None:
        moments = fallback_moments()
        rest, gram = W - basis @ (basis.T @ W), moments.gram.total_FF.to(W.dtype)
        if moments.of_input and W.shape[0] > W.shape[1]:
            further, energies = basis_from_input(rest, gram, rank - determined, cutoff)
        elif moments.of_input:
            further, energies = basis_from_output(rest @ gram @ rest.T)
        else:
            rest_of_outputs = gram - basis @ (basis.T @ gram)
            further, energies = basis_from_output(rest_of_outputs - (rest_of_outputs @ basis) @ basis.T)
        basis = torch.cat([basis, further[:, : min(rank - determined, numerical_rank(energies, cutoff))]], dim=1)
        origins = ["all tokens together give others"] if basis.shape[1] > determined else []
    if basis.shape[1] < rank:
        own = _leading_left_vectors(W - basis @ (basis.T @ W), rank - basis.shape[1])
        basis = torch.cat([basis, own], dim=1)
        origins.append("the weight's own SVD gives the others")
    return basis, f"calibration determines {determined} of {rank} directions; {', '.join(origins)}"


def _relative(lost: float, energy: float) -> float:
    return (max(lost, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def _leading_left_vectors(R: torch.Tensor, count: int) -> torch.Tensor:
    """Compute `count` leading left singular vectors (out, count) of R (out x in), by the narrow side.

    If R has lower rank the others are zero: such columns cost bytes and change nothing.
    """
    vectors = torch.zeros(R.shape[0], count, dtype=R.dtype, device=R.device)
    left, values, _ = torch.linalg.svd(R, full_matrices=False)
    usable = min(count, numerical_rank(values.square(), CUTOFF[torch.float64]))
    vectors[:, :usable] = left[:, :usable]
    return vectors


def _with_fixed_signs(basis: torch.Tensor) -> torch.Tensor:
    """Make each column's largest entry positive: the sign of an eigenvector is arbitrary, a file should not be."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _lost_energy(
    W: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    basis: torch.Tensor,
    projected: torch.Tensor,
    moments: Moments,
    gram: torch.Tensor,
    energy: torch.Tensor,
) -> torch.Tensor:
    """Compute ||X (W - up down)^T||_F^2 of the factors as stored, rounding included; `projected` is basis^T W.

    The result is exact from an input moment. An output moment knows X only through W: the error from rounding `down`,
    which is independent of X, is estimated from the input's energy per feature, and the rest is exact.
    """
    if moments.of_input:
        down_gram = down @ gram
        cross = (down_gram * (projected if up is basis else up.T @ W)).sum(dtype=torch.float64)
        inner = down_gram @ down.T
        rounding = torch.zeros_like(energy)
    else:
        assert moments.input_energy is not None
        gram_basis = gram @ basis
        cross = (up * gram_basis).sum(dtype=torch.float64)
        inner = basis.T @ gram_basis
        rounded = down - projected  # ||up r||^2 of each column r, without their product (out, in)
        rounding = (((up.T @ up) @ rounded * rounded).sum(dim=0) * moments.input_energy).sum()
    return energy - 2 * cross + ((up.T @ up) * inner).sum(dtype=torch.float64) + rounding
