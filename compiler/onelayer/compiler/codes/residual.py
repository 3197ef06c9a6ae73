"""What codes leave of a weight, and moments of both sides, in; the best thin factors, quantized, out. Pure.

R = W - scale * C[codes] (out x in). Wanted: the rank-k `up down` that minimizes ||G^1/2 (R - up down) H^1/2||_F, where
H are the second moments of the inputs and G those of the loss's gradients at the outputs: to first order, this is the
error of what flows back as well as of what flows forward. With U the leading left singular vectors of G^1/2 R H^1/2, it
is up = G^-1/2 U, down = U^T G^1/2 R, so H is never inverted. Without G, the error of the outputs alone counts. Shape
letters: O outputs, I inputs, k rank, B blocks of b.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE
from onelayer.compiler.factors.expectations import LOOKING, Expectations, solve
from onelayer.compiler.factors.moments import OutputWeights, blocks_times, damped, times_blocks
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.subspace import block_width, leading_eigenvectors

# Added to the diagonal of the moments of inputs, as a share of its mean.
INPUT_DAMPING = 1e-6
# Pulls `up` towards its earlier value, as a share of the mean energy of the directions of `down`.
RIDGE = 1e-4
TOLERANCE, WORTHWHILE_SHARE = 1e-3, 0.6


@dataclass(frozen=True)
class Sides:
    """Both moments as blocks (B, b, b): H = S S^T, and what the outputs count, if gradients are known."""

    H: torch.Tensor
    S: torch.Tensor
    outputs: OutputWeights | None = None

    @classmethod
    def of_inputs(cls, inputs: torch.Tensor, expected: Expectations = LOOKING) -> "Sides":
        """Factor the moments of the inputs."""
        H = damped(inputs, INPUT_DAMPING)
        S, failed = torch.linalg.cholesky_ex(H)
        if not expected.holds((failed == 0).all()):
            values, vectors = torch.linalg.eigh(H)
            S = vectors * values.clamp_min(0.0).sqrt()[:, None]
        return cls(H.float(), S.float())

    def weighted(self, M: torch.Tensor) -> torch.Tensor:
        """Compute G^1/2 M of a matrix (O, columns)."""
        return M if self.outputs is None else self.outputs.weighted(M)

    def energy(self, M: torch.Tensor) -> torch.Tensor:
        """Compute ||M S||_F^2 and ||G^1/2 M S||_F^2, (2,) in float64, of a matrix (O, I)."""
        MS = times_blocks(M, self.S)
        forward = MS.square().sum(dtype=torch.float64)
        return torch.stack([forward, self.weighted(MS).square().sum(dtype=torch.float64)])


def residual_factors(
    R: torch.Tensor, sides: Sides, rank: int, dtype: torch.dtype, seed: int, expected: Expectations = LOOKING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute quantized factors of R (O, I) as stored: up^T (k, bytes of a row of O) and down (k, bytes of a row of I).

    Each side is solved again for the rounding of the other, as for any quantized factors; the model uses them in
    `dtype`.
    """
    U = _leading(R, sides, rank, seed, expected)
    exact = U if sides.outputs is None else sides.outputs.unweighted(U)
    up_quantized = quantize_matrix(exact.T, RESIDUAL_DTYPE)
    up = _used(up_quantized, len(R), dtype)
    G_up = up if sides.outputs is None else blocks_times(sides.outputs.G.to(up), up)
    down_quantized = quantize_matrix(solve(_regular(up.T @ G_up), G_up.T @ R, expected), RESIDUAL_DTYPE)
    down = _used(down_quantized, R.shape[1], dtype).T
    H_down = times_blocks(down, sides.H)
    inner = H_down @ down.T
    ridge = RIDGE * inner.diagonal().mean() + torch.finfo(inner.dtype).tiny
    seen = inner + ridge * torch.eye(rank, device=R.device)
    solved = solve(seen, H_down @ R.T + ridge * up.T, expected)
    return quantize_matrix(solved, RESIDUAL_DTYPE), down_quantized


def product_of(up: torch.Tensor, down: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Multiply stored factors of a residual (O, I), in float32, as the model uses them in `dtype`."""
    return _used(up, shape[0], dtype) @ _used(down, shape[1], dtype).T


def _used(quantized: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the transposed matrix (width, k) as the model uses it, in float32."""
    return dequantize_matrix(quantized, width, RESIDUAL_DTYPE, dtype).to(torch.float32).T


def _leading(R: torch.Tensor, sides: Sides, rank: int, seed: int, expected: Expectations) -> torch.Tensor:
    """Compute the leading left singular vectors (O, k) of G^1/2 R S by the narrow side; missing ones are zero."""
    M = times_blocks(sides.weighted(R), sides.S)
    tall = M.shape[0] > M.shape[1]
    C = M.T @ M if tall else M @ M.T
    energy = C.trace()
    pairs = None
    if block_width(rank) < WORTHWHILE_SHARE * len(C) and expected.holds(energy > 0):
        pairs = leading_eigenvectors(C, energy, rank, TOLERANCE, 1.0, seed)
    if pairs is None:
        values, vectors = torch.linalg.eigh(C.to(torch.float64))
        pairs = vectors.flip(1)[:, :rank].float(), values.flip(0)[:rank].float()
    basis, energies = pairs
    if tall:
        seen = energies > torch.finfo(torch.float32).eps * energies[:1].clamp_min(torch.finfo(torch.float32).tiny)
        basis = torch.where(seen, (M @ basis) / energies.clamp_min(torch.finfo(torch.float32).tiny).sqrt(), 0.0)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _regular(gram: torch.Tensor) -> torch.Tensor:
    """Set zeros on the diagonal to one; the solution of such columns, which stand for missing directions, is zero."""
    return gram + (gram.diagonal() == 0).to(gram).diag()
