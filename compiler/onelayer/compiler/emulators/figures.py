"""The figures of each compressed linear and stack, as an emulator records them."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from onelayer.compiler.codes.forms import CodeBits, CodeShape, CodeWidth
from onelayer.compiler.emulators.facts import ENDINGS, stack_tensor
from onelayer.compiler.factors.factorize import FactorFigures
from onelayer.compiler.factors.stored_forms import REFERENCE_BYTES
from onelayer.compiler.results import Result, round_significant

FIGURE_DIGITS = 6  # significant digits of a recorded figure
# Figures of a linear's factors as compiled; they are no longer true after the factors are trained.
ERROR_FIELDS = (
    "error",
    "optimal_error",
    "unquantised_error",
    "gradient_error",
    "prefix_errors",
    "dense_error",
    "largest_error",
)


class LinearSummary(Result):
    """One compressed linear; errors are relative Frobenius errors of its output over the calibration rows.

    `error` is that of the factors as stored, `unquantised_error` that of the same factors before they were quantized
    (None if they are not), `optimal_error` the least possible at this rank, which the `fast` solver does not know.
    `form` "dense" is a whole weight, quantized, with its full rank. "coded" is codes of `code_bits` bits for
    `code_width` neighbors with residual factors of `rank`; `gradient_error` weighs the error by the loss's gradients at
    the output too (None without a pass back). Factors that a pass back weighs have all errors, singular values and
    energies weighted like that.
    `float64_solves` counts matrices that float64 had to solve again: float32 did not certify the accuracy.
    """

    name: str
    rank: int
    error: float
    optimal_error: float | None
    unquantised_error: float | None = None
    form: Literal["factors", "dense", "coded"] = "factors"
    code_width: CodeWidth | None = None
    code_bits: CodeBits | None = None
    gradient_error: float | None = None
    float64_solves: int = 0


class LinearFigures(LinearSummary):
    """A compressed linear with the spectrum of its output.

    `singular_values` are the kept ones, `output_energy` is the sum of the squares of all. A prefix of rank j has the
    relative error sqrt(1 - sum_{i<=j} s_i^2 / output_energy), or `prefix_errors[j - 1]` if the factors are quantized,
    so a slice needs no data. `dense_error` is that of the whole weight, quantized; None if that was not tried.
    """

    singular_values: list[float]
    output_energy: float
    fallback: str | None
    prefix_errors: list[float] | None = None
    dense_error: float | None = None

    @property
    def summary(self) -> LinearSummary:
        """The figures without the spectrum."""
        return LinearSummary(**self.model_dump(include=set(LinearSummary.model_fields)))

    @classmethod
    def of(
        cls,
        name: str,
        rank: int,
        factors: FactorFigures,
        quantized_errors: torch.Tensor | None,
        dense_error: torch.Tensor | None,
    ) -> "LinearFigures":
        """Collect the figures of factors, of their quantized prefixes and of the quantized weight, to six digits."""
        errors = None
        if quantized_errors is not None:
            errors = [round_significant(error, FIGURE_DIGITS) for error in quantized_errors.tolist()]
        optimal = factors.optimal_error
        return cls(
            name=name,
            rank=rank,
            error=round_significant(factors.error, FIGURE_DIGITS) if errors is None else errors[-1],
            optimal_error=None if optimal is None else round_significant(optimal, FIGURE_DIGITS),
            unquantised_error=None if errors is None else round_significant(factors.error, FIGURE_DIGITS),
            singular_values=[
                round_significant(value, FIGURE_DIGITS) for value in factors.singular_values[:rank].tolist()
            ],
            output_energy=round_significant(float(factors.energy), FIGURE_DIGITS),
            fallback=factors.fallback,
            prefix_errors=errors,
            dense_error=None if dense_error is None else round_significant(float(dense_error), FIGURE_DIGITS),
            float64_solves=int(factors.solved_again),
        )

    @classmethod
    def of_dense(
        cls, name: str, shape: torch.Size, energy: float | torch.Tensor, dense_error: float | torch.Tensor
    ) -> "LinearFigures":
        """Collect the figures of a weight (out, in) that is quantized whole."""
        error = round_significant(float(dense_error), FIGURE_DIGITS)
        return cls(
            name=name,
            rank=min(shape),
            error=error,
            optimal_error=0.0,
            unquantised_error=0.0,
            form="dense",
            singular_values=[],
            output_energy=round_significant(float(energy), FIGURE_DIGITS),
            fallback=None,
            dense_error=error,
        )

    @classmethod
    def of_codes(
        cls,
        name: str,
        shape: torch.Size,
        code: CodeShape | None,
        rank: int | None,
        energy: float,
        error: float,
        gradient_error: float | None,
    ) -> "LinearFigures":
        """Collect the figures of a coded weight (out, in), or of one quantized whole if there is no code."""
        figures = cls.of_dense(name, shape, energy, error)
        rounded = None if gradient_error is None else round_significant(gradient_error, FIGURE_DIGITS)
        if code is None:
            return figures.model_copy(update={"gradient_error": rounded})
        shape_of_codes = {"code_width": code.width, "code_bits": code.bits}
        coded = {"form": "coded", "rank": rank, **shape_of_codes, "dense_error": None, "gradient_error": rounded}
        return figures.model_copy(update={**coded, "optimal_error": None, "unquantised_error": None})

    def as_dense(self, shape: tuple[int, int]) -> "LinearFigures":
        """Return the figures of the whole weight, which was tried too and replaces the factors."""
        assert self.dense_error is not None
        return LinearFigures.of_dense(self.name, torch.Size(shape), self.output_energy, self.dense_error)


class StackSummary(LinearSummary):
    """One compressed stack of experts, all of one rank; errors are those of all experts' outputs together.

    `largest_error` is that of the worst expert (unknown for a slice). `fallbacks` counts the experts that calibration
    did not determine.
    """

    experts: int
    largest_error: float | None
    fallbacks: int


class StackFigures(LinearFigures):
    """A stack as one linear whose outputs are those of all its experts: squares are summed over them.

    `rows` (E) counts the rows that each expert read. `expert_fallbacks` lists, by reason, the numbers of the experts
    that calibration did not determine.
    """

    shape: tuple[int, int, int]
    rows: list[int]
    largest_error: float | None
    expert_fallbacks: dict[str, list[int]]

    @property
    def stack_summary(self) -> StackSummary:
        """The figures without spectrum and rows."""
        fields = self.model_dump(include=set(LinearSummary.model_fields))
        starved = {expert for experts in self.expert_fallbacks.values() for expert in experts}
        return StackSummary(**fields, experts=self.shape[0], largest_error=self.largest_error, fallbacks=len(starved))

    @classmethod
    def over(
        cls, name: str, shape: tuple[int, int, int], experts: Sequence[LinearFigures], rows: list[int]
    ) -> "StackFigures":
        """Combine the figures of all experts of a stack, in order."""
        energies = [item.output_energy for item in experts]
        energy = sum(energies)

        def together(errors: Sequence[float]) -> float:
            """Compute the relative error of all experts from that of each."""
            lost = sum(error * error * part for error, part in zip(errors, energies, strict=True))
            return round_significant((lost / energy) ** 0.5, FIGURE_DIGITS) if energy else 0.0

        def if_known(field: str) -> float | None:
            errors = [getattr(item, field) for item in experts]
            return None if None in errors else together(errors)

        prefixes = [item.prefix_errors for item in experts if item.prefix_errors is not None]
        fallbacks: dict[str, list[int]] = {}
        for number, item in enumerate(experts):
            if item.fallback is not None:
                fallbacks.setdefault(item.fallback, []).append(number)
        starved = sum(len(numbers) for numbers in fallbacks.values())
        first = experts[0]
        return cls(
            name=name,
            shape=shape,
            rank=first.rank,
            form=first.form,
            code_width=first.code_width,
            code_bits=first.code_bits,
            error=together([item.error for item in experts]),
            optimal_error=if_known("optimal_error"),
            unquantised_error=if_known("unquantised_error"),
            singular_values=[
                round_significant(sum(value * value for value in column) ** 0.5, FIGURE_DIGITS)
                for column in zip(*(item.singular_values for item in experts), strict=True)
            ],
            output_energy=round_significant(energy, FIGURE_DIGITS),
            fallback=f"{starved} of {len(experts)} experts: see expert_fallbacks" if starved else None,
            prefix_errors=[together(column) for column in zip(*prefixes, strict=True)] if prefixes else None,
            dense_error=if_known("dense_error"),
            float64_solves=sum(item.float64_solves for item in experts),
            rows=rows,
            largest_error=max(item.error for item in experts),
            expert_fallbacks=fallbacks,
        )


def kept_bytes_share(
    tensor_bytes: Mapping[str, int],
    linears: Mapping[str, tuple[int, int]],
    stacks: Mapping[str, tuple[int, int, int]],
) -> float:
    """Bytes of what replaces linears (out, in) and stacks (E, out, in), as a share of their size at 16 bits."""
    replacing = {stack_tensor(name, ending) for name in stacks for ending in ENDINGS}
    kept = sum(size for name, size in tensor_bytes.items() if name.endswith(ENDINGS) or name in replacing)
    weights = sum(math.prod(shape) for shape in (*linears.values(), *stacks.values()))
    return round_significant(kept / (REFERENCE_BYTES * weights), FIGURE_DIGITS) if weights else 1.0
