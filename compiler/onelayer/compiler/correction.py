"""The correction of one linear: its weight, the emulator's factors and the adapter in, corrected factors out; pure.

EMLoC (arXiv 2506.12015, stage 3), with the scaling that the published code leaves out. All of it in float64.

Letters: r rank of the adapter, k rank of the emulator, in / out features of the linear.
"""

import math
from dataclasses import dataclass

import torch

# Rows of W that are widened to float64 at a time.
BLOCK_ROWS = 1024
# Directions of A weaker than this share of the strongest are none: their basis vectors are arbitrary.
RELATIVE_CUTOFF = 1e-6


@dataclass(frozen=True)
class Correction:
    """The numbers of one linear: A' (r, in) with orthonormal rows, B_c (out, r); per direction its ratio and clamp."""

    a: torch.Tensor
    b: torch.Tensor
    ratios: torch.Tensor
    clamped: int


def split_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """P (in, r') with orthonormal columns and B' (out, r') such that B' P^T = scaling * b @ a, in float64.

    From the thin SVD A^T = P S R^T: B' = scaling * B R S. Only directions that A has are kept, so r' <= r.
    """
    p, s, r_t = torch.linalg.svd(a.double().T, full_matrices=False)
    kept = s > RELATIVE_CUTOFF * s.amax()
    return p[:, kept], scaling * (b.double() @ r_t.T * s)[:, kept]


def correct_linear(
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    limit: float | None,
) -> Correction:
    """Solve the correction of one linear.

    weight (out, in) of the original; up (out, k) and down (k, in), the emulator's; a (r, in), b (out, r), scaling: the
    adapter as trained. With P and B' of `split_product` and D = (W - up down) P, the result is A' = P^T, B_c = B' - D.
    `limit` bounds mean|D_i| / mean|B'_i| of every direction i (lambda of the paper); None leaves D as it is.
    """
    p, b_split = split_product(a, b, scaling)
    blocks = [weight[start : start + BLOCK_ROWS].double() @ p for start in range(0, len(weight), BLOCK_ROWS)]
    error = torch.cat(blocks) - up.double() @ (down.double() @ p)
    size, reference = error.abs().mean(0), b_split.abs().mean(0)
    # min(1, limit / ratio). Without a limit the bound is infinite (undefined where B' is zero): nothing exceeds it.
    bound = (math.inf if limit is None else limit) * reference
    over = size > bound
    error = torch.where(over, error * (bound / size), error)
    return Correction(p.T.contiguous(), b_split - error, size / reference, int(over.sum()))
