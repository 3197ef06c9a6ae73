"""The correction of one linear: its weight, the emulator's factors and the adapter in, corrected factors out; pure.

This is EMLoC (arXiv 2506.12015, stage 3) with the scaling that the published code leaves out. Matrices as small as the
adapter are computed in float64, products with the weight in float32 (in float64 if the weight is).

Letters: r rank of the adapter, k rank of the emulator, in / out features of the linear.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from onelayer.compiler.correct.memory import BLOCK_BYTES
from onelayer.compiler.machine.threads import single_threaded
from onelayer.compiler.machine.transfers import upload

# Directions of A weaker than this share of the strongest are ignored: their basis vectors are arbitrary.
RELATIVE_CUTOFF = 1e-6
# Added to the inputs' energy in every direction, as a share of its mean: few samples leave some directions unseen.
RIDGE = 1e-3


@dataclass(frozen=True)
class Correction:
    """The corrected factors of one linear: A' (r, in) with orthonormal rows and B_c (out, r).

    `ratios` has a ratio for each direction, |D| / |B'|; `clamped` counts the directions that exceeded the limit.
    """

    a: torch.Tensor
    b: torch.Tensor
    ratios: torch.Tensor
    clamped: int

    def scaled(self, scale: float) -> "Correction":
        """Return the correction with its effect multiplied by `scale`."""
        return self if scale == 1 else replace(self, b=scale * self.b)


@dataclass(frozen=True)
class Gap:
    """The parts from which every correction of one linear is made, whatever its limit.

    p (in, r') is orthonormal; with b (out, r') it gives the adapter as trained: b p^T. error (out, r') = (W - E) p is
    what the emulator gets wrong in the adapter's directions.
    """

    p: torch.Tensor
    b: torch.Tensor
    error: torch.Tensor

    def there(self, error: torch.Tensor) -> "Gap":
        """Return the gap with its error next to the other parts, in their precision."""
        return replace(self, error=error.to(self.p))

    def limited(self, limit: float | None) -> Correction:
        """Compute A' = p^T and B_c = b - error, with each direction of the error scaled down to respect `limit`.

        `limit` bounds mean|error_i| / mean|b_i| of every direction i (lambda of the paper). 0 leaves the adapter
        unchanged, None leaves the error unchanged.
        """
        size, reference = self.error.abs().mean(0), self.b.abs().mean(0)
        # min(1, limit / ratio). Without a limit the bound is infinite (undefined where b is zero): nothing exceeds it.
        bound = (math.inf if limit is None else limit) * reference
        over = size > bound
        error = torch.where(over, self.error * (bound / size), self.error)
        return Correction(self.p.T.contiguous(), self.b - error, size / reference, int(over.sum()))


def split_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute P (in, r') with orthonormal columns and B' (out, r') such that B' P^T = scaling * b @ a, in float64.

    They follow from the thin SVD A^T = P S R^T: B' = scaling * B R S. Only directions that A has are kept, so r' <= r.
    """
    p, s, r_t = torch.linalg.svd(a.double().T, full_matrices=False)
    kept = s > RELATIVE_CUTOFF * s.amax()
    return p[:, kept], scaling * (b.double() @ r_t.T * s)[:, kept]


def measure_gap(
    weight: Iterable[torch.Tensor],
    up: torch.Tensor,
    down: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    transposed: bool = False,
) -> Gap:
    """Compute the gap of one linear. Its error is left on the device and in the precision of the product: see `there`.

    `weight` yields consecutive rows of the original's weight (out, in), or (in, out) if `transposed`. `up` (out, k) and
    `down` (k, in) are the emulator's factors, or its whole weight (out, in) and None. `a` (r, in), `b` (out, r) and
    `scaling` are the adapter as trained.
    """
    with single_threaded():
        p, b_split = split_product(a, b, scaling)
        of_original = project(weight, p, transposed)
        of_emulator = _emulated(up, down, upload(p.to(of_original.dtype), of_original.device))
    return Gap(p, b_split, of_original - of_emulator)


@dataclass(frozen=True)
class Oblique:
    """How far inputs lie outside the span of p, from seen (in, r') = E[x x^T] p up to a factor.

    The gap whose full correction is best on average over inputs x, not only for those in the span: error =
    argmin_K E |(W - E) x - K p^T x|^2 = (W - E) seen (p^T seen)^-1.
    """

    span: Gap
    seen: torch.Tensor
    inner: torch.Tensor

    @classmethod
    def of(cls, span: Gap, seen: torch.Tensor) -> "Oblique | None":
        """Normalize `seen`, which lies next to p; None if nothing was seen, or if it is not finite."""
        inner = span.p.T @ seen
        energy = float(inner.trace()) / max(1, len(inner))
        if not 0 < energy < math.inf:
            return None
        inner = inner + RIDGE * energy * torch.eye(len(inner), dtype=inner.dtype)
        return cls(span, seen / energy, inner / energy)

    def missed(
        self, weight: Iterable[torch.Tensor], up: torch.Tensor, down: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        """Compute (W - E) seen (out, r') on the device of the weight; arguments as in `measure_gap`."""
        with single_threaded():
            of_original = project(weight, self.seen, transposed)
            seen = upload(self.seen.to(of_original.dtype), of_original.device)
            return of_original - _emulated(up, down, seen)

    def gap(self, missed: torch.Tensor) -> Gap:
        """Solve for the gap, with what is `missed` next to p or on the way from a device."""
        return Gap(self.span.p, self.span.b, torch.linalg.solve(self.inner, missed.to(self.seen).T).T)


def _emulated(up: torch.Tensor, down: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    """Compute E p (out, r) on the device and in the dtype of p; E is up down, or `up` alone."""
    up = upload(up, p.device).to(p)
    return up @ (p if down is None else upload(down, p.device).to(p) @ p)


def project(weight: Iterable[torch.Tensor], p: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Compute W p (out, r) from consecutive rows of W (out, in), or of W^T (in, out) if `transposed`.

    The product is formed as p^T W^T: thin times wide is several times faster than wide times thin.
    """
    parts: list[torch.Tensor] = []
    total, done = torch.zeros(()), 0
    for rows in weight:
        wide = torch.promote_types(rows.dtype, torch.float32)
        p_t = upload(p.to(wide).T.contiguous(), rows.device)
        step = max(1, BLOCK_BYTES // (wide.itemsize * max(1, rows.shape[1])))
        buffer = torch.empty(min(step, len(rows)), rows.shape[1], dtype=wide, device=rows.device)
        for start in range(0, len(rows), step):
            block = buffer[: min(step, len(rows) - start)].copy_(rows[start : start + step])
            if transposed:
                total = total.to(block) + p_t[:, done : done + len(block)] @ block
            else:
                parts.append(p_t @ block.T)
            done += len(block)
    return total.T if transposed else torch.cat(parts, dim=1).T
