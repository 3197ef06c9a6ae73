"""The settings of a compile."""

from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import Field, model_validator

from onelayer.compiler.codes.forms import LEAST_SHARE, RESIDUAL_DTYPE, are_codes_best
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import Allocation, Solver
from onelayer.compiler.factors.stored_forms import (
    DEFAULT_KEEP_BYTES,
    REFERENCE_BYTES,
    FactorDtype,
    keep_ratio,
    within_bytes,
)
from onelayer.compiler.settings import Batched, Lengths, Must, Option, Resumable, Revised, Samples, Seeded, Settings

Form = Literal["auto", "factors", "coded"]
Ratio = Annotated[float, Field(gt=0, le=1)]
_RATIO_RULE = "lie between 0 and 1, for example 0.25"


class Sampling(Lengths):
    """How much calibration data the compiler sees."""

    samples: Samples = 64


class EmulatorSize(Settings):
    """How much of each linear an emulator keeps, and how it is stored."""

    ratio: Annotated[
        Ratio | None,
        Field(description="Share of each linear's parameters that the emulator keeps, 0 to 1."),
        Option(default="by --keep-bytes"),
        Must(_RATIO_RULE),
    ] = None
    keep_bytes: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="In place of --ratio: the share of each linear's bytes at 16 bits, 0 to 1."),
        Option(default=f"{DEFAULT_KEEP_BYTES}"),
        Must("lie between 0 and 1, for example 0.15"),
    ] = None
    factor_dtype: Annotated[
        FactorDtype | None,
        Field(description="How the emulator's factors are stored; nf4 holds 3.8 times the rank of bf16."),
        Option(default="as MODEL is with --ratio, else the best for the bytes"),
    ] = None
    rank_allocation: Annotated[
        Allocation | None,
        Field(description="The same ratio for every linear, or the same total where it buys most."),
        Option(default="uniform with --ratio, else spectrum"),
    ] = None

    form: Annotated[
        Form,
        Field(
            description="What replaces a linear: low-rank factors, codes with a thin low-rank part, or the better of "
            "both for --keep-bytes."
        ),
    ] = "auto"
    backward: Annotated[
        bool | None,
        Field(description="Weigh errors by what the loss feels: a pass back over the calibration data."),
        Option(flags="--backward/--no-backward", default="on with codes"),
    ] = None

    @property
    def share(self) -> float:
        """The kept share of bytes, if no ratio says how much is kept."""
        return self.keep_bytes or DEFAULT_KEEP_BYTES

    @property
    def prefers_codes(self) -> bool:
        """Whether linears become codes if they are wide enough; `coded` asks for it, and `auto` if they are best."""
        fixed = (self.ratio, self.factor_dtype, self.rank_allocation) != (None, None, None)
        return self.form == "coded" or (self.form == "auto" and not fixed and are_codes_best(self.share))

    @property
    def allocation(self) -> Allocation:
        """How ranks are chosen."""
        return self.rank_allocation or ("spectrum" if self.ratio is None else "uniform")


class CompileSettings(EmulatorSize, Sampling, Batched, Seeded, Resumable, Revised):
    """What can be set of a compile."""

    solver: Annotated[
        Solver, Field(description="Exact eigenvectors, or a randomized sketch within a percent of them.")
    ] = "exact"

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.ratio is not None and self.keep_bytes is not None:
            raise InputError("--ratio and --keep-bytes say the same in two ways; give one of them")
        if self.ratio == 1 and self.factor_dtype is None:
            raise InputError(f"--ratio {self.ratio}: must {_RATIO_RULE}")
        return self

    def resolved(self, value_bytes: int, *, is_bfloat16: bool) -> "ResolvedSettings":
        """Fill in what the original decides. "bf16" for a bfloat16 original means the original's own dtype."""
        ratio, factor_dtype = self.ratio, self.factor_dtype
        if self.prefers_codes:
            return self._resolved_codes()
        if ratio is None:
            ratio, factor_dtype = within_bytes(self.share, factor_dtype, value_bytes)
        if factor_dtype == "bf16" and is_bfloat16:
            factor_dtype = None
        chosen = {"ratio": ratio, "keep_bytes": None, "factor_dtype": factor_dtype, "rank_allocation": self.allocation}
        return ResolvedSettings.of({**dict(self), **chosen, "form": "factors"})

    def _resolved_codes(self) -> "ResolvedSettings":
        """Fill in what follows from codes: their size is a share of bytes, and their low-rank part has one dtype."""
        if self.ratio is not None:
            raise InputError("--ratio: codes have no ratio of parameters; give --keep-bytes, or --form factors")
        if self.factor_dtype not in (None, RESIDUAL_DTYPE) or self.rank_allocation not in (None, "uniform"):
            raise InputError(
                f"--form coded: stores its factors in {RESIDUAL_DTYPE}, with uniform ranks; leave --factor-dtype and "
                "--rank-allocation out"
            )
        if self.share < LEAST_SHARE:
            raise InputError(
                f"--form coded: needs --keep-bytes {LEAST_SHARE:.3f} or more; give --form factors for less"
            )
        if (ratio := keep_ratio(self.share, RESIDUAL_DTYPE, REFERENCE_BYTES)) == 1:
            raise InputError(
                f"--form coded: with --keep-bytes {self.share:g} every weight fits whole in {RESIDUAL_DTYPE}; give "
                "less, or --form factors"
            )
        return ResolvedSettings.of(
            {
                **dict(self),
                "ratio": ratio,
                "keep_bytes": self.share,
                "factor_dtype": RESIDUAL_DTYPE,
                "rank_allocation": "uniform",
                "form": "coded",
                "backward": self.backward is not False,
            }
        )


class ResolvedSettings(CompileSettings):
    """The settings of a compile whose original is known.

    `ratio` is the kept share of each linear's values. With a `factor_dtype` it may be 1: all are kept, quantized. With
    codes it is that of experts, which are factors, and `keep_bytes` is the share of bytes that the linears take.
    """

    ratio: Annotated[Ratio, Must(_RATIO_RULE)]
    rank_allocation: Allocation

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        """Replace the check of what was asked for: here both sizes are known."""
        return self

    def recorded(self, *without: str) -> dict[str, Any]:
        """Leave out what only codes have, if there are none, and a pass back that did not run: older records stay."""
        if self.form == "coded":
            return super().recorded(*without)
        return super().recorded(*without, "form", "keep_bytes", *(() if self.backward else ("backward",)))


class CompileKeywords(TypedDict, total=False):
    """The keywords of `compile_emulator`."""

    ratio: float | None
    keep_bytes: float | None
    factor_dtype: FactorDtype | None
    samples: int
    max_length: int
    max_image_pixels: int | None
    batch_size: int
    solver: Solver
    rank_allocation: Allocation | None
    form: Form
    backward: bool | None
    device: str | None
    host_memory_bytes: int | None
    seed: int
    resume: bool
    revision: str | None
