"""Second moments of what linears read or write, never wider than the narrow side of the linear.

A linear with out < in is served by the moment of its output, C = Y^T Y (out x out); one with out >= in by that of its
input, G = X^T X (in x in), which every linear reading the same tensor shares (q/k/v, gate/up). Shape letters: N rows
(tokens), F features.
"""

import copy
from dataclasses import dataclass

import torch

# More rows than this share with an infinite or NaN entry mean a broken model or broken data, not an outlier.
NON_FINITE_LIMIT = 0.1


def row_count(x: torch.Tensor) -> int:
    """How many rows `x` (..., F) has; a bare number is one."""
    return x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 1


def finite_rows(x: torch.Tensor) -> torch.Tensor | None:
    """Which rows of (..., F) hold nothing but finite numbers, (N,); None where all do."""
    # One non-finite entry anywhere makes the sum non-finite; only then is it worth looking row by row.
    if torch.isfinite(x.sum()):
        return None
    keep_N = torch.isfinite(x.reshape(row_count(x), -1)).all(dim=-1)
    return None if keep_N.all() else keep_N


def check_rows(name: str, dropped_rows: int, rows: int) -> None:
    """Raise `RuntimeError` where more of the calibration's rows are not finite than an outlier explains."""
    if dropped_rows > NON_FINITE_LIMIT * rows:
        raise RuntimeError(
            f"{name}: {dropped_rows} of {rows} calibration rows are not finite, more than {NON_FINITE_LIMIT:.0%}; "
            "check the checkpoint's dtype and the data"
        )


class Gram:
    """X^T X (F x F) over many batches of rows: products in `product_dtype`, totals in float64.

    Rows with a non-finite entry are left out and counted.
    """

    def __init__(self, features: int, device: torch.device, product_dtype: torch.dtype = torch.float64) -> None:
        self.total_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped_rows = 0
        self.product_dtype = product_dtype

    def add(self, x: torch.Tensor) -> torch.Tensor | None:
        """Add the rows of `x` (..., F); returns which were taken, (N,), or None where all were."""
        x_NF = x.reshape(-1, x.shape[-1]).to(self.product_dtype)
        product_FF = x_NF.T @ x_NF
        self.rows += len(x_NF)
        keep_N = None
        # One non-finite entry anywhere makes the trace non-finite; only then is it worth looking row by row.
        if not torch.isfinite(product_FF.diagonal().sum()):
            keep_N = torch.isfinite(x_NF).all(dim=-1)
            self.dropped_rows += int((~keep_N).sum())
            x_NF = x_NF[keep_N]
            product_FF = x_NF.T @ x_NF
        self.total_FF += product_FF
        return keep_N

    def without(self, part: "Gram") -> "Gram":
        """This Gram as it was before the rows of `part` were added."""
        rest = copy.copy(self)
        rest.total_FF = self.total_FF - part.total_FF
        rest.rows, rest.dropped_rows = self.rows - part.rows, self.dropped_rows - part.dropped_rows
        return rest


@dataclass
class Moments:
    """What calibration says about one linear: a Gram of its input or of its output, and the input's energy by feature.

    `input_energy` (in,) is the diagonal of X^T X; with an output moment it prices the rounding of `down`.
    """

    gram: Gram
    of_input: bool
    input_energy: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, int], of_input: bool, device: torch.device, product_dtype: torch.dtype
    ) -> "Moments":
        """Empty moments of a linear (out, in)."""
        out_features, in_features = shape
        gram = Gram(in_features if of_input else out_features, device, product_dtype)
        return cls(gram, of_input, None if of_input else torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Add what was read, (..., in), and what came of it without bias, (..., out), which an input moment ignores.

        A row that one of the two leaves out, both do.
        """
        if self.of_input:
            self.gram.add(x)
            return
        assert y is not None
        assert self.input_energy is not None
        keep_N = self.gram.add(y)
        x_NF = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.input_energy += (x_NF if keep_N is None else x_NF[keep_N]).square().sum(dim=0, dtype=torch.float64)
