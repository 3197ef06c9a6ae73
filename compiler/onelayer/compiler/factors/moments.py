"""Second moments of what linears read or write, never wider than the narrow side of the linear.

A linear with out < in uses the moment of its output, C = Y^T Y (out x out). A linear with out >= in uses the moment of
its input, G = X^T X (in x in), which all linears with the same input share (q/k/v, gate/up). Shape letters: N rows
(tokens), F features.
"""

import copy
from dataclasses import dataclass

import torch

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

    Rows with a non-finite entry are left out and counted.
    """

    def __init__(self, features: int, device: torch.device, product_dtype: torch.dtype = torch.float64) -> None:
        self.total_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped_rows = 0
        self.product_dtype = product_dtype

    def add(self, x: torch.Tensor) -> torch.Tensor | None:
        """Add the rows of `x` (..., F); return which were taken, (N,), or None if all were."""
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

    def without(self, x: torch.Tensor) -> "Gram":
        """Return this Gram without the rows of `x` (..., F)."""
        part = Gram(len(self.total_FF), self.total_FF.device, self.product_dtype)
        part.add(x)
        rest = copy.copy(self)
        rest.total_FF = self.total_FF - part.total_FF
        rest.rows, rest.dropped_rows = self.rows - part.rows, self.dropped_rows - part.dropped_rows
        return rest


@dataclass
class Moments:
    """The statistics of one linear from calibration: the Gram of its input or output, and the input's feature energies.

    `input_energy` (in,) is the diagonal of X^T X. With an output moment, it gives the error from rounding `down`.
    """

    gram: Gram
    of_input: bool
    input_energy: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, int], of_input: bool, device: torch.device, product_dtype: torch.dtype
    ) -> "Moments":
        """Start the moments of a linear (out, in) that has read nothing yet."""
        out_features, in_features = shape
        gram = Gram(in_features if of_input else out_features, device, product_dtype)
        return cls(gram, of_input, None if of_input else torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Add inputs (..., in) and their outputs without bias (..., out); an input moment ignores the outputs.

        A row that one of the two leaves out is left out of both.
        """
        if self.of_input:
            self.gram.add(x)
            return
        assert y is not None
        assert self.input_energy is not None
        keep_N = self.gram.add(y)
        x_NF = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.input_energy += (x_NF if keep_N is None else x_NF[keep_N]).square().sum(dim=0, dtype=torch.float64)
