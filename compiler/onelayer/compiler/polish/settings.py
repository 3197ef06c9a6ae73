"""The settings of exact steps."""

import re
from typing import Annotated, Literal, Self, TypedDict

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from onelayer.compiler.denoising.settings import TrainedNoise, Weighting
from onelayer.compiler.errors import InputError
from onelayer.compiler.settings import Lengths, Must, Option, Resumable, Revised, Seeded, Settings

KeptInputs = int | float | Literal["exact"]
GradientNorm = Annotated[
    PositiveFloat,
    Field(description="Longer gradients are shortened to this; inf: none."),
    Must("be greater than 0; inf is no limit"),
]


def _regular_expression(targets: str | list[str] | None) -> str | list[str] | None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise InputError(
                f"--target-modules {targets}: no regular expression ({error}); give one, names, or all-linear"
            ) from None
    return targets


class ExactSteps(Settings):
    """The number of exact steps, and their size."""

    steps: Annotated[PositiveInt, Field(description="Exact steps; each reads the model twice.")] = 10
    batch_size: Annotated[PositiveInt, Field(description="Examples per step.")] = 64
    micro_batch_size: Annotated[PositiveInt, Field(description="Examples computed at once.")] = 1
    learning_rate: Annotated[
        PositiveFloat,
        Field(description="Learning rate; the default is meant for LoRA."),
        Must("be a number greater than 0"),
    ] = 1e-3
    warmup_steps: Annotated[NonNegativeInt, Field(description="Steps over which the learning rate rises.")] = 0
    max_gradient_norm: GradientNorm = 1.0
    eval_steps: Annotated[PositiveInt, Field(description="Steps between two looks at --eval-data.")] = 1
    activations: Annotated[
        PositiveInt | Annotated[float, Field(gt=0, lt=1)] | Literal["exact"],
        Field(
            description="How layer inputs are kept between passes: as they are, or as factors of that rank and 2 bits "
            "a value."
        ),
        Option(metavar="exact|K|SHARE", reader="rank_or_exact"),
        Must("be a number of rows, or a share between 0 and 1"),
    ] = "exact"
    packing: Annotated[
        bool,
        Field(description="Put short examples into one row of --max-length; same gradients, fewer calls."),
        Option(flags="--packing/--no-packing"),
    ] = False


class PolishSettings(TrainedNoise, ExactSteps, Lengths, Seeded, Resumable, Revised):
    """The settings of a polish; `lora_rank`, `lora_alpha` and `target_modules` are for a fresh adapter."""

    # A manifest has no infinity.
    max_gradient_norm: Annotated[GradientNorm, Field(allow_inf_nan=True)] = ExactSteps.default("max_gradient_norm")
    lora_rank: Annotated[PositiveInt | None, Field(description="Without ADAPTER: rank of a fresh one.")] = None
    lora_alpha: Annotated[
        PositiveInt | PositiveFloat | None,
        Field(description="Without ADAPTER: scaled by alpha / rank; 1 if left out."),
        Must("be a number greater than 0"),
    ] = None
    target_modules: Annotated[
        str | list[str] | None,
        AfterValidator(_regular_expression),
        Field(description="Without ADAPTER: `all-linear`, names separated by commas, or a regular expression."),
        Option(metavar="NAMES", reader="modules", default="all-linear"),
    ] = None

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise InputError(f"--warmup-steps {self.warmup_steps}: must lie between 0 and --steps {self.steps}")
        return self

    @property
    def activation_rank(self) -> int | float | None:
        """The rank of kept unit inputs; None if they are kept exactly."""
        return None if isinstance(self.activations, str) else self.activations

    def learning_rate_at(self, step: int) -> float:
        """Return a rate that rises linearly over the warm-up, then falls linearly to zero (Trainer's default)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        return self.learning_rate * (self.steps - step) / (self.steps - self.warmup_steps)


class PolishKeywords(TypedDict, total=False):
    """The keywords of `polish_adapter`."""

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    max_gradient_norm: float
    max_length: int
    max_image_pixels: int | None
    eval_steps: int
    lora_rank: int | None
    lora_alpha: float | None
    target_modules: str | list[str] | None
    activations: KeptInputs
    packing: bool
    weighting: Weighting
    prior_weight: float
    device: str | None
    host_memory_bytes: int | None
    seed: int
    resume: bool
    revision: str | None
