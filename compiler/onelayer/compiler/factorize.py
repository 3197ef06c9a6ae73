"""(weight, moments, rank) -> factors and their error. Pure: tensors in, tensors and figures out.

Convention y = W x, W (out x in), X (N x in) the calibration rows, Y = X W^T. Wanted: the rank-k W_k that minimises
||X W^T - X W_k^T||_F, the activation-aware SVD of SVD-LLM and EMLoC (arXiv 2506.12015, stage 1). Both routes below end
in W_k = U_k U_k^T W with orthonormal U_k, so nothing is inverted and W itself is never decomposed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from onelayer.compiler.moments import Moments

# Eigenvalues below this share of the largest are rounding: of float64 sums, or of sums of float32 products.
CUTOFF = {torch.float64: 1e-12, torch.float32: 1e-7}


# The fast solver carries half as many directions again as it keeps and multiplies twice more by the moment: measured at
# most 0.6 % above the optimum over flat and steep spectra. Where it would carry most directions, `exact` is no slower.
OVERSAMPLING, POWER_ITERATIONS, WORTHWHILE_SHARE = 0.5, 2, 0.6

Solver = Literal["exact", "fast"]


@dataclass(frozen=True)
class Factors:
    """W ~ up @ down with `up` (out, k) and `down` (k, in), ordered by energy: a prefix is the smaller optimum.

    Errors are relative Frobenius errors of the output over the calibration rows: `error` of the factors as stored,
    `optimal_error` the Eckart-Young bound sqrt(sum_{i>k} s_i^2 / sum s_i^2), None where the solver does not know all
    of the spectrum. `singular_values` (descending, at least the k leading ones) are those of Y, `energy` the sum of
    all their squares. `fallback` says in words where calibration did not determine the factors.
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float
    optimal_error: float | None
    singular_values: torch.Tensor
    energy: float
    fallback: str | None


def factorize(
    W: torch.Tensor,
    moments: Moments,
    rank: int,
    dtype: torch.dtype,
    solver: Solver = "exact",
    seed: int = 0,
    reserve: Callable[[], Moments] | None = None,
) -> Factors:
    """The best rank-`rank` factors of W (out, in) under `moments`, stored in `dtype`.

    `exact` solves the eigenproblem in float64. `fast` finds the leading subspace by randomised iteration in float32
    (Halko, Martinsson and Tropp, arXiv 0909.4061), seeded by `seed`. Where `moments` determine fewer directions than
    `rank`, the best under `reserve` of what is left of W follow, and the weight's own after these; so a prefix is still
    what a smaller rank would give.
    """
    narrow = min(W.shape)
    fast = solver == "fast" and _sketch_width(rank, narrow) < WORTHWHILE_SHARE * narrow
    W = W.to(torch.float32 if fast else torch.float64)
    gram = moments.gram.total_FF.to(W.dtype)
    cutoff = max(CUTOFF[moments.gram.product_dtype], CUTOFF[W.dtype])
    output_gram = None if moments.of_input else gram
    if fast:
        energy = float((W @ gram * W).sum() if moments.of_input else gram.trace())
        apply = _output_moment(W, gram, moments.of_input)
        basis, energies = _leading_basis(apply, W, rank, seed)
    elif moments.of_input and W.shape[0] > W.shape[1]:
        basis, energies = _basis_from_input(W, gram, rank, cutoff)
        energy = float(energies.sum())
    else:
        output_gram = W @ gram @ W.T if moments.of_input else gram
        basis, energies = _basis_from_output(output_gram)
        energy = float(energies.sum())
    basis = basis[:, : min(rank, _numerical_rank(energies, cutoff))]
    basis, fallback = _completed(basis, W, rank, cutoff, reserve)
    basis = _with_fixed_signs(basis)
    up, down = basis.to(dtype), (basis.T @ W).to(dtype)
    lost = _lost_energy(W, up.to(W.dtype), down.to(W.dtype), basis, moments, output_gram)
    optimal = None if fast else _relative(float(energies[rank:].sum()), energy)
    return Factors(up, down, _relative(lost, energy), optimal, energies.sqrt(), energy, fallback)


def _completed(
    basis: torch.Tensor, W: torch.Tensor, rank: int, cutoff: float, reserve: Callable[[], Moments] | None
) -> tuple[torch.Tensor, str | None]:
    """`rank` directions (out, rank), orthonormal or zero, that begin with `basis`; in words what gave the others."""
    found = basis.shape[1]
    if found == rank:
        return basis, None
    told = []
    if reserve is not None:
        moments = reserve()
        rest, gram = W - basis @ (basis.T @ W), moments.gram.total_FF.to(W.dtype)
        if moments.of_input and W.shape[0] > W.shape[1]:
            further, energies = _basis_from_input(rest, gram, rank - found, cutoff)
        elif moments.of_input:
            further, energies = _basis_from_output(rest @ gram @ rest.T)
        else:
            left = gram - basis @ (basis.T @ gram)  # of the outputs
            further, energies = _basis_from_output(left - (left @ basis) @ basis.T)
        basis = torch.cat([basis, further[:, : min(rank - found, _numerical_rank(energies, cutoff))]], dim=1)
        told = ["all tokens together give others"] if basis.shape[1] > found else []
    if basis.shape[1] < rank:
        own = _leading_left_vectors(W - basis @ (basis.T @ W), rank - basis.shape[1])
        basis = torch.cat([basis, own], dim=1)
        told.append("the weight's own SVD gives the others")
    return basis, f"calibration determines {found} of {rank} directions; {', '.join(told)}"


def _relative(lost: float, energy: float) -> float:
    return (max(lost, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def _sketch_width(rank: int, narrow: int) -> int:
    return min(narrow, rank + max(8, int(OVERSAMPLING * rank)))


def _output_moment(W: torch.Tensor, gram: torch.Tensor, of_input: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Z -> C Z with C = Y^T Y (out x out); from an input moment as W (G (W^T Z)), so that C is never formed."""
    return (lambda Z: W @ (gram @ (W.T @ Z))) if of_input else (lambda Z: gram @ Z)


def _leading_basis(
    apply: Callable[[torch.Tensor], torch.Tensor], W: torch.Tensor, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors and eigenvalues of the symmetric operator `apply`, by randomised subspace iteration."""
    generator = torch.Generator().manual_seed(seed)
    width = _sketch_width(rank, min(W.shape))
    Q = torch.randn(W.shape[0], width, generator=generator).to(W)
    for _ in range(POWER_ITERATIONS + 1):
        Q, _ = torch.linalg.qr(apply(Q))
    values, vectors = torch.linalg.eigh(Q.T @ apply(Q))
    return Q @ vectors.flip(1), values.flip(0).clamp_min(0.0)


def _basis_from_output(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvectors (out, out) and eigenvalues of C = Y^T Y (out x out), descending."""
    values, vectors = torch.linalg.eigh(C)
    return vectors.flip(1), values.flip(0).clamp_min(0.0)


def _basis_from_input(W: torch.Tensor, G: torch.Tensor, rank: int, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left singular vectors (out, <= rank) of W S with S S^T = G (in x in), and all squared singular values.

    V are eigenvectors of S^T W^T W S (in x in, the narrow side), U = W S V / s; no inverse of S is needed. S is the
    Cholesky factor, or the eigenvectors scaled where G is singular.
    """
    S, failed = torch.linalg.cholesky_ex(G)
    if failed:
        values, vectors = torch.linalg.eigh(G)
        S = vectors * values.clamp_min(0.0).sqrt()
    WS = W @ S
    energies, V = torch.linalg.eigh(WS.T @ WS)
    energies, V = energies.flip(0).clamp_min(0.0), V.flip(1)
    kept = min(rank, _numerical_rank(energies, cutoff))
    return WS @ (V[:, :kept] / energies[:kept].sqrt()), energies


def _numerical_rank(values: torch.Tensor, cutoff: float) -> int:
    """How many of some descending eigenvalues stand above rounding."""
    return int((values > cutoff * values[0]).sum()) if len(values) and values[0] > 0 else 0


def _leading_left_vectors(R: torch.Tensor, count: int) -> torch.Tensor:
    """`count` leading left singular vectors (out, count) of R (out x in), by the narrow side.

    Where R has lower rank the others are zero: such columns cost their bytes and change nothing.
    """
    vectors = torch.zeros(R.shape[0], count, dtype=R.dtype, device=R.device)
    left, values, _ = torch.linalg.svd(R, full_matrices=False)
    usable = min(count, _numerical_rank(values.square(), CUTOFF[torch.float64]))
    vectors[:, :usable] = left[:, :usable]
    return vectors


def _with_fixed_signs(basis: torch.Tensor) -> torch.Tensor:
    """Each column's largest entry made positive: eigenvectors have no sign of their own, files should."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _lost_energy(
    W: torch.Tensor, up: torch.Tensor, down: torch.Tensor, basis: torch.Tensor, moments: Moments, C: torch.Tensor | None
) -> float:
    """||X (W - up down)^T||_F^2 of the factors as stored, roundings included.

    Exact from an input moment. An output moment knows X only through W, so there the rounding of `down`, which is
    independent of X, is priced by the input's energy per feature; the rest is exact.
    """
    if moments.of_input:
        E = W - up @ down
        return float(((E @ moments.gram.total_FF.to(E.dtype)) * E).sum())
    assert C is not None
    assert moments.input_energy is not None
    projected = C @ basis
    lost = C.trace() - 2 * (up * projected).sum() + ((up.T @ up) * (basis.T @ projected)).sum()
    rounding = ((up @ (down - basis.T @ W)).square().sum(dim=0) * moments.input_energy).sum()
    return float(lost + rounding)
