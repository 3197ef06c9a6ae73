"""(weight, moments, rank) -> factors and their error. Pure: tensors in, tensors and figures out.

Convention y = W x, W (out x in), X (N x in) the calibration rows, Y = X W^T. Wanted: the rank-k W_k that minimises
||X W^T - X W_k^T||_F, the activation-aware SVD of SVD-LLM and EMLoC (arXiv 2506.12015, stage 1). Both routes below end
in W_k = U_k U_k^T W with orthonormal U_k, so nothing is inverted and W itself is never decomposed.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.moments import Moments

# Eigenvalues below this share of the largest are rounding: of float64 sums, or of sums of float32 products.
CUTOFF = {torch.float64: 1e-12, torch.float32: 1e-7}


@dataclass(frozen=True)
class Factors:
    """W ~ up @ down with `up` (out, k) and `down` (k, in), ordered by energy: a prefix is the smaller optimum.

    Errors are relative Frobenius errors of the output over the calibration rows: `error` of the factors as stored,
    `optimal_error` the Eckart-Young bound sqrt(sum_{i>k} s_i^2 / sum s_i^2) on what rank k can do. `singular_values`
    (all of them, descending) are those of Y. `fallback` says in words where calibration did not determine the factors.
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float
    optimal_error: float
    singular_values: torch.Tensor
    fallback: str | None


def factorize(W: torch.Tensor, moments: Moments, rank: int, dtype: torch.dtype) -> Factors:
    """The best rank-`rank` factors of W (out, in) under `moments`, stored in `dtype`. Arithmetic is float64."""
    W64 = W.to(torch.float64)
    gram = moments.gram.total_FF
    if moments.of_input and W.shape[0] > W.shape[1]:
        basis, energies = _basis_from_input(W64, gram, rank, CUTOFF[moments.gram.product_dtype])
        output_gram = None
    else:
        output_gram = W64 @ gram @ W64.T if moments.of_input else gram
        basis, energies = _basis_from_output(output_gram, rank, CUTOFF[moments.gram.product_dtype])
    fallback = None
    if basis.shape[1] < rank:
        found = basis.shape[1]
        basis = torch.cat([basis, _leading_left_vectors(W64 - basis @ (basis.T @ W64), rank - found)], dim=1)
        fallback = f"calibration determines {found} of {rank} directions; the weight's own SVD gives the others"
    basis = _with_fixed_signs(basis)
    up, down = basis.to(dtype), (basis.T @ W64).to(dtype)
    total = float(energies.sum())
    optimal = float(energies[rank:].sum())
    lost = _lost_energy(W64, up.to(torch.float64), down.to(torch.float64), basis, moments, output_gram)
    return Factors(
        up=up,
        down=down,
        error=(max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0,
        optimal_error=(optimal / total) ** 0.5 if total > 0 else 0.0,
        singular_values=energies.sqrt(),
        fallback=fallback,
    )


def _basis_from_output(C: torch.Tensor, rank: int, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors (out, <= rank) of C = Y^T Y (out x out), and all eigenvalues, descending."""
    values, vectors = torch.linalg.eigh(C)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    kept = min(rank, _numerical_rank(values, cutoff))
    return vectors[:, :kept], values


def _basis_from_input(W: torch.Tensor, G: torch.Tensor, rank: int, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left singular vectors (out, <= rank) of W S with S S^T = G (in x in), and all squared singular values.

    V are eigenvectors of S^T W^T W S (in x in, the narrow side), U = W S V / s; no inverse of S is needed.
    """
    values, vectors = torch.linalg.eigh(G)
    WS = W @ (vectors * values.clamp_min(0.0).sqrt())
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
        return float(((E @ moments.gram.total_FF) * E).sum())
    assert C is not None
    assert moments.input_energy is not None
    projected = C @ basis
    lost = C.trace() - 2 * (up * projected).sum() + ((up.T @ up) * (basis.T @ projected)).sum()
    rounding = ((up @ (down - basis.T @ W)).square().sum(dim=0) * moments.input_energy).sum()
    return float(lost + rounding)
