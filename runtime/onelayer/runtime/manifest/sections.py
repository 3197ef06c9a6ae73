"""The sections of a manifest, as pydantic models: the single source of what may be written, and of the JSON Schema."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from onelayer.compiler.compile.settings import EmulatorSize, Sampling
from onelayer.compiler.correct.settings import CorrectSettings
from onelayer.compiler.polish.settings import ExactSteps
from onelayer.compiler.refine.settings import FactorTraining
from onelayer.compiler.settings import Batched, Lengths, MaxLength, OnDevice, Settings
from onelayer.runtime.manifest.values import (
    DataSources,
    Size,
    checked_limit,
    checked_modules,
    model_source,
    none_word,
)
from onelayer.runtime.training.settings import (
    ActivationRank,
    Dropout,
    LoraAlpha,
    LoraFields,
    LoraRank,
    TrainSettings,
    Where,
)

TargetModules = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(checked_modules)]


class Section(Settings):
    """A mapping of the file; unknown keys are refused."""


SliceRatio = Annotated[float, Field(gt=0, lt=1)] | None
SectionT = TypeVar("SectionT", bound=Section)


def overridden(defaults: SectionT, own: SectionT | None) -> SectionT:
    """The defaults with what a task sets itself."""
    if own is None:
        return defaults
    return defaults.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Model(Section):
    """The original model: a directory, or a Hub id with an optional revision."""

    path: Annotated[str, AfterValidator(model_source)]
    revision: str | None = None


class Calibration(Sampling, Section):
    """What the compiler looks at: data, how many examples of it, cut at how many tokens."""

    data: DataSources


class Refine(FactorTraining, Section):
    """Training of the emulator's factors, layer by layer, against the original; the rate is relative to their size.

    `samples` of the calibration data are used, whatever the compile used, `batch_size` of them computed at once.
    """


class Emulator(EmulatorSize, Section):
    """The compact stand-in, of a size that is said in one of three ways.

    `keep_bytes` is the kept share of each linear's bytes at 16 bits, 0.25 where nothing is said; `memory` asks for the
    best emulator with which every task can be trained on a device of that size; `ratio` is the kept share of each
    linear's parameters, as in the paper. `factor_dtype` is how factors are stored: left out, the original's dtype with
    a ratio, and else the best for the bytes. `rank_allocation`, left out, is uniform with a ratio and else by spectrum.
    `refine` trains the factors afterwards, on the calibration data: left out, as that is by default but with a ratio;
    `none` for not at all.
    """

    calibration: Calibration
    ratio: SliceRatio = None
    memory: Size | None = None
    refine: Annotated[Refine | None, BeforeValidator(none_word)] = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_not_none(cls, written: Any) -> Any:
        """An empty `refine:` means the default, as for every field; write `none` to switch refinement off."""
        if isinstance(written, dict) and written.get("refine", "") is None:
            return {name: value for name, value in written.items() if name != "refine"}
        return written

    @property
    def refinement(self) -> Refine | None:
        """How the factors are trained after the compile, if they are."""
        if "refine" in self.model_fields_set or self.ratio is not None:
            return self.refine
        return Refine()


class Lora(Section):
    """The adapter, as PEFT means it; `target_modules` is "all-linear", a regular expression or a list."""

    r: LoraRank = TrainSettings.default("lora_rank")
    alpha: LoraAlpha = TrainSettings.default("lora_alpha")
    target_modules: TargetModules = TrainSettings.default("target_modules")
    dropout: Dropout = LoraFields.model_fields["lora_dropout"].default
    use_rslora: bool = LoraFields.model_fields["use_rslora"].default
    rank_pattern: dict[str, PositiveInt] = LoraFields.model_fields["rank_pattern"].default
    alpha_pattern: dict[str, PositiveFloat] = LoraFields.model_fields["alpha_pattern"].default


class Activations(Section):
    """What is stored for the backward pass: `where` to compress it, and to which rank (number, share or `auto`).

    What factors of this rank leave is stored with two bits a value.
    """

    where: Where = TrainSettings.default("activations")
    rank: ActivationRank = TrainSettings.default("activation_rank")


class Training(Lengths, Section):
    """How an adapter is trained; `args` are SFTConfig's own arguments."""

    lora: Lora = Lora()
    activations: Activations = Activations()
    args: dict[str, Any] = Field(default={})


class Correct(Section):
    """The correction's clamp (lambda in the paper); None, written `none`, for no clamp; `auto` chooses per task.

    `default` is `auto` for tasks with validation data, and 3, the paper's, for others.
    """

    limit: Annotated[PositiveFloat | Literal["auto", "default"] | None, BeforeValidator(checked_limit)] = (
        CorrectSettings.default("limit")
    )


class Polish(ExactSteps, Section):
    """Exact steps on the original after the correction. A task's validation data choose the best adapter.

    `activations` is how layer inputs are kept: exact, or as factors of a rank (a number, or a share of the width) and
    two bits for what they leave of each value. With `packing`, short examples share rows of
    `max_length`.
    """


class Stream(OnDevice, Batched, Section):
    """How the passes over the original run; nothing here changes a result, so nothing here makes a step run again."""


class Task(Section):
    """One adapter: its data, and what differs from the `train` defaults; `ratio` asks for a smaller emulator."""

    train: DataSources
    validation: DataSources | None = None
    test: DataSources | None = None
    lora: Lora | None = None
    activations: Activations | None = None
    args: dict[str, Any] = Field(default={})
    polish: Polish | None = None
    max_length: MaxLength | None = None
    ratio: SliceRatio = None
    merge: bool = False
