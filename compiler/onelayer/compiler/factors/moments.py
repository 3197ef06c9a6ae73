"""Second moments of what linears read or write, never wider than the narrow side of the linear.

A linear with out < in uses the moment of its output, C = Y^T Y (out x out). A linear with out >= in uses the moment of
its input, G = X^T X (in x in), which all linears with the same input share (q/k/v, gate/up). Shape letters: N rows
(tokens), F features.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from onelayer.compiler.factors.expectations import LOOKING, Expectations
from onelayer.compiler.factors.sum_grid import SumGrid

# Added to the diagonal of the moments of gradients at outputs, as a share of its mean.
OUTPUT_DAMPING = 1e-2
# More rows than this share with an infinite or NaN entry mean a broken model or broken data, not an outlier.
NON_FINITE_LIMIT = 0.1


def row_count(x: torch.Tensor) -> int:
    """Count the rows of `x` (..., F); a bare number is one row."""
    return x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 1


def finite_rows(x: torch.Tensor) -> torch.Tensor | None:
    """Return which rows of (..., F) are finite, (N,), or None if all are."""
    # One non-finite entry anywhere makes the sum non-finite; only then is it worth looking row by row.
    if torch.isfinite(x.sum()):
        return None
    keep_N = torch.isfinite(x.reshape(row_count(x), -1)).all(dim=-1)
    return None if keep_N.all() else keep_N


def check_rows(name: str, dropped_rows: int, rows: int) -> None:
    """Raise `RuntimeError` if more calibration rows are not finite than an outlier explains."""
    if dropped_rows > NON_FINITE_LIMIT * rows:
        raise RuntimeError(
            f"{name}: {dropped_rows} of {rows} calibration rows are not finite, more than {NON_FINITE_LIMIT:.0%}; "
            "check the checkpoint's dtype and the data"
        )


class Gram:
    """The sum X^T X (F x F) over many batches of rows: products in `product_dtype`, totals in float64.

    Rows with a non-finite entry are left out and counted on the device, so that the host does not wait for it. With a
    `grid` that knows how many products are expected, the total does not depend on their order.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        product_dtype: torch.dtype = torch.float64,
        grid: SumGrid | None = None,
    ) -> None:
        self.total_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.product_dtype = product_dtype
        self.grid = grid or SumGrid()

    @property
    def dropped_rows(self) -> int:
        """The number of rows that were left out; the host waits for it."""
        return int(self.dropped)

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Add the rows of `x` (..., F); return which were taken, (N,)."""
        x_NF = x.reshape(-1, x.shape[-1]).to(self.product_dtype)
        # One non-finite entry makes the sum of its row non-finite.
        finite_N = torch.isfinite(x_NF.sum(dim=-1))
        x_NF = x_NF.masked_fill(~finite_N[:, None], 0.0)
        self.rows += len(x_NF)
        self.dropped = self.dropped + (~finite_N).sum()
        self.total_FF += self.grid.rounded(x_NF.T @ x_NF)
        return finite_N

    def without(self, x: torch.Tensor) -> "Gram":
        """Return this Gram without the rows of `x` (..., F)."""
        part = Gram(len(self.total_FF), self.total_FF.device, self.product_dtype, self.grid)
        part.add(x)
        rest = copy.copy(self)
        rest.total_FF = self.total_FF - part.total_FF
        rest.rows, rest.dropped = self.rows - part.rows, self.dropped - part.dropped
        return rest


def dropped_rows(dropped: Sequence[torch.Tensor]) -> list[int]:
    """Return how many rows were left out, from what each sum counted; the host waits once for all."""
    return torch.stack(list(dropped)).tolist() if dropped else []


@dataclass
class Moments:
    """The statistics of one linear from calibration: the Gram of its input or output, and the input's feature energies.

    `input_energy` (in,) is the diagonal of X^T X. With an output moment, it gives the error from rounding `down`.
    """

    gram: Gram
    of_input: bool
    input_energy: torch.Tensor | None = None
    energy_grid: SumGrid = field(default_factory=SumGrid)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        of_input: bool,
        device: torch.device,
        product_dtype: torch.dtype,
        grid: Callable[[], SumGrid] = SumGrid,
    ) -> "Moments":
        """Start the moments of a linear (out, in) that has read nothing yet; `grid` makes the grids of its sums."""
        out_features, in_features = shape
        gram = Gram(in_features if of_input else out_features, device, product_dtype, grid())
        energy = None if of_input else torch.zeros(in_features, dtype=torch.float64, device=device)
        return cls(gram, of_input, energy, grid())

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Add inputs (..., in) and their outputs without bias (..., out); an input moment ignores the outputs.

        A row that one of the two leaves out is left out of both.
        """
        if self.of_input:
            self.gram.add(x)
            return
        assert y is not None
        assert self.input_energy is not None
        finite_N = self.gram.add(y)
        x_NF = x.reshape(-1, x.shape[-1]).to(torch.float32).masked_fill(~finite_N[:, None], 0.0)
        self.input_energy += self.energy_grid.rounded(x_NF.square().sum(dim=0, dtype=torch.float64))


@dataclass(frozen=True)
class OutputWeights:
    """What the outputs of a linear count: G, and the symmetric roots G^1/2 and G^-1/2, as blocks (B, b, b).

    G are the second moments of the loss's gradients at the outputs. To first order ||G^1/2 E X^T|| says what an error E
    of the weight costs, so the best factors of G^1/2 W are those of W for what flows back as well.
    """

    G: torch.Tensor
    root: torch.Tensor
    inverse_root: torch.Tensor

    @classmethod
    def of(
        cls, moments: torch.Tensor | None, out_features: int, expected: Expectations = LOOKING
    ) -> "OutputWeights | None":
        """Factor the moments of gradients, blocks of which the last may be padded; None without any gradient."""
        if moments is None or not expected.holds(moments.diagonal(dim1=1, dim2=2).sum() > 0):
            return None
        G = damped(moments, OUTPUT_DAMPING, out_features)
        values, vectors = torch.linalg.eigh(G)
        roots = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        root = (vectors * roots[:, None]) @ vectors.transpose(1, 2)
        return cls(G, root, (vectors / roots[:, None]) @ vectors.transpose(1, 2))

    def weighted(self, M: torch.Tensor) -> torch.Tensor:
        """Compute G^1/2 M of a matrix (out, columns)."""
        return blocks_times(self.root.to(M), M)

    def unweighted(self, M: torch.Tensor) -> torch.Tensor:
        """Compute G^-1/2 M of a matrix (out, columns)."""
        return blocks_times(self.inverse_root.to(M), M)

    def applied(self, W: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, Moments]:
        """Return G^1/2 W and the moments of a linear with this weight, in float64."""
        W = self.weighted(W.to(torch.float64))
        if moments.of_input:
            return W, moments
        gram = copy.copy(moments.gram)
        gram.total_FF = times_blocks(self.weighted(gram.total_FF), self.root.to(gram.total_FF))
        return W, replace(moments, gram=gram)


def damped(blocks: torch.Tensor, share: float, features: int | None = None) -> torch.Tensor:
    """Normalize blocks (B, b, b) to a mean diagonal of 1 and add `share` to it; zeros become the identity.

    `features` are the real ones, where the last block is padded.
    """
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum() / (diagonal.numel() if features is None else features)
    normalized = torch.where(mean > 0, blocks / mean, 0.0)
    least = torch.where(mean > 0, torch.full_like(mean, share), 1.0)
    return normalized + least * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def in_blocks(x_NF: torch.Tensor, block: int) -> torch.Tensor:
    """Cut the features of (N, F) into blocks (B, N, block); the last is padded with zeros."""
    padded = torch.nn.functional.pad(x_NF, (0, -x_NF.shape[-1] % block))
    return padded.reshape(len(x_NF), -1, block).transpose(0, 1)


def times_blocks(M: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply M (rows, F) by the block-diagonal matrix of `blocks` (B, b, b)."""
    product = in_blocks(M, blocks.shape[-1]) @ blocks
    return product.transpose(0, 1).reshape(len(M), -1)[:, : M.shape[1]]


def blocks_times(blocks: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """Multiply symmetric `blocks` (B, b, b) by M (F, columns)."""
    return times_blocks(M.T, blocks).T
