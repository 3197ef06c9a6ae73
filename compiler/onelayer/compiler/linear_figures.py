"""What became of each linear, as the records of an emulator say it."""

from collections.abc import Mapping
from typing import Literal

import torch

from onelayer.compiler.emulator_reader import DENSE, DOWN, UP
from onelayer.compiler.factor_dtypes import REFERENCE_BYTES
from onelayer.compiler.factorize import Factors
from onelayer.compiler.measure import Result
from onelayer.compiler.quantised_factors import PackedDense, PackedFactors


class LinearSummary(Result):
    """One compressed linear; errors are relative Frobenius errors of its output over the calibration rows.

    `error` is that of the factors as stored, `unquantised_error` that of the same factors before they were quantised
    (None where they are not), `optimal_error` the least that any factors of this rank can have; the `fast` solver does
    not know it. `form` "dense" is a whole weight, quantised; its rank is the full one.
    """

    name: str
    rank: int
    error: float
    optimal_error: float | None
    unquantised_error: float | None = None
    form: Literal["factors", "dense"] = "factors"


class LinearFigures(LinearSummary):
    """`singular_values`: its output's, the kept ones; `output_energy`: all their squares.

    A prefix of rank j has the relative error sqrt(1 - sum_{i<=j} s_i^2 / output_energy), so a slice needs no data;
    where the factors are quantised, it has `prefix_errors[j - 1]`. `dense_error`: of the whole weight, quantised; None
    where that was not tried.
    """

    singular_values: list[float]
    output_energy: float
    fallback: str | None
    prefix_errors: list[float] | None = None
    dense_error: float | None = None

    @property
    def summary(self) -> LinearSummary:
        """Without the spectrum."""
        return LinearSummary(**self.model_dump(include=set(LinearSummary.model_fields)))

    @classmethod
    def of(
        cls, name: str, factors: Factors, packed: PackedFactors | None, dense: PackedDense | None
    ) -> "LinearFigures":
        """The figures of some factors, of what they were packed to, and of the weight packed instead, to six digits."""
        rank = factors.up.shape[1]
        errors = None if packed is None else [digits(error) for error in packed.errors.tolist()]
        return cls(
            name=name,
            rank=rank,
            error=digits(factors.error) if errors is None else errors[-1],
            optimal_error=None if factors.optimal_error is None else digits(factors.optimal_error),
            unquantised_error=None if errors is None else digits(factors.error),
            singular_values=[digits(value) for value in factors.singular_values[:rank].tolist()],
            output_energy=digits(factors.energy),
            fallback=factors.fallback,
            prefix_errors=errors,
            dense_error=None if dense is None else digits(dense.error),
        )

    @classmethod
    def of_dense(cls, name: str, shape: torch.Size, energy: float, dense_error: float) -> "LinearFigures":
        """The figures of a weight (out, in) that is quantised as it is."""
        return cls(
            name=name,
            rank=min(shape),
            error=digits(dense_error),
            optimal_error=0.0,
            unquantised_error=0.0,
            form="dense",
            singular_values=[],
            output_energy=digits(energy),
            fallback=None,
            dense_error=digits(dense_error),
        )

    def as_dense(self, shape: tuple[int, int]) -> "LinearFigures":
        """The figures once the whole weight, which was tried too, takes the factors' place."""
        assert self.dense_error is not None
        return LinearFigures.of_dense(self.name, torch.Size(shape), self.output_energy, self.dense_error)


def digits(value: float) -> float:
    """Rounded to six digits."""
    return float(f"{value:.6g}")


def kept_bytes_share(tensor_bytes: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Bytes of the tensors that stand for the linears `shapes` (out, in), over what these take at 16 bits."""
    kept = sum(size for name, size in tensor_bytes.items() if name.endswith((UP, DOWN, DENSE)))
    weights = sum(out_features * in_features for out_features, in_features in shapes.values())
    return digits(kept / (REFERENCE_BYTES * weights)) if weights else 1.0
