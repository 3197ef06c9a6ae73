"""The sections of a manifest as pydantic models: the single source of valid fields and of the JSON Schema."""

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
from onelayer.compiler.encode.settings import EncodedPictures
from onelayer.compiler.polish.settings import ExactSteps
from onelayer.compiler.refine.settings import FactorTraining
from onelayer.compiler.sampling.settings import Pictures
from onelayer.compiler.settings import Batched, Lengths, MaxLength, OnDevice, Settings
from onelayer.runtime.anchors.settings import ANCHOR_EVERY, AnchorBits
from onelayer.runtime.manifest.values import (
    DataSource,
    DataSources,
    Size,
    checked_limit,
    checked_modules,
    model_source,
    none_word,
)
from onelayer.runtime.streamed.settings import Way
from onelayer.runtime.training.settings import (
    ActivationRank,
    Dropout,
    LoraAlpha,
    LoraFields,
    LoraRank,
    TrainSettings,
    Where,
)
from onelayer.runtime.training.trainer_args import Method

TargetModules = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(checked_modules)]


# Only the word `none` switches them off.
OFF_BY_WORD = ("anchor", "refine")


class Section(Settings):
    """A mapping of the file; unknown keys are refused."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_not_none(cls, written: Any) -> Any:
        """An empty `refine:` or `anchor:` means the default, as for every field."""
        if not isinstance(written, dict):
            return written
        empty = {name for name in OFF_BY_WORD if name in cls.model_fields and written.get(name, "") is None}
        return {name: value for name, value in written.items() if name not in empty}


SliceRatio = Annotated[float, Field(gt=0, lt=1)] | None
SectionT = TypeVar("SectionT", bound=Section)


def overridden(defaults: SectionT, own: SectionT | None) -> SectionT:
    """Return these defaults, overridden by what a task sets itself."""
    if own is None:
        return defaults
    return defaults.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Model(Section):
    """The original model: a directory, or a Hub id with an optional revision."""

    path: Annotated[str, AfterValidator(model_source)]
    revision: str | None = None


class Images(EncodedPictures, Section):
    """How folders of images are encoded for the denoiser of a pipeline; with this section all data are such folders.

    `class_data` are images of the subject's class, which training keeps as they are.
    """

    class_data: DataSource | None = None


class Samples(Pictures, Section):
    """Pictures drawn with the final adapter of every task; steps and size are the pipeline's own if omitted."""


class Calibration(Sampling, Section):
    """The compiler's calibration data: how many examples, each cut at how many tokens."""

    data: DataSources


class Refine(FactorTraining, Section):
    """Training of the emulator's factors against the original, layer by layer. The rate is relative to their size.

    It uses `samples` examples of the calibration data, whatever the compile used, and computes `batch_size` at once.
    """


class Emulator(EmulatorSize, Section):
    """The compact stand-in for the original. Three fields set its size; give at most one.

    `keep_bytes` is the kept share of each linear's bytes at 16 bits, 0.25 by default. `memory` asks for the best
    emulator that every task can be trained on with a device of that size. `ratio` is the kept share of each linear's
    parameters, as in the paper. `factor_dtype` is how factors are stored. If omitted, it is the original's dtype with a
    ratio, and otherwise the best for the bytes. `rank_allocation`, if omitted, is uniform with a ratio and otherwise by
    spectrum. `refine` trains the factors afterwards, on the calibration data. If omitted, it runs with its defaults if
    a task trains without anchors, but not with a ratio; `none` switches it off.
    """

    calibration: Calibration
    ratio: SliceRatio = None
    memory: Size | None = None
    refine: Annotated[Refine | None, BeforeValidator(none_word)] = None


class Lora(Section):
    """The adapter, as PEFT means it; `target_modules` is "all-linear", a regular expression or a list."""

    r: LoraRank = TrainSettings.default("lora_rank")
    alpha: LoraAlpha = TrainSettings.default("lora_alpha")
    target_modules: TargetModules = TrainSettings.default("target_modules")
    dropout: Dropout = TrainSettings.default("dropout")
    use_rslora: bool = LoraFields.model_fields["use_rslora"].default
    rank_pattern: dict[str, PositiveInt] = LoraFields.model_fields["rank_pattern"].default
    alpha_pattern: dict[str, PositiveFloat] = LoraFields.model_fields["alpha_pattern"].default


class Activations(Section):
    """What is stored for the backward pass: `where` to compress it, and to which rank (number, share or `auto`).

    The residual of these factors is stored with two bits per value.
    """

    where: Where = TrainSettings.default("activations")
    rank: ActivationRank = TrainSettings.default("activation_rank")


class Anchor(Section):
    """How each layer of the emulator is given what it lacks of the original's answer, on the rows trained on next.

    The original streams by every `every` optimizer steps; `bits` are those of each value that is given.
    """

    every: PositiveInt = ANCHOR_EVERY
    bits: AnchorBits = TrainSettings.default("anchor_bits")


class Training(Lengths, Section):
    """How an adapter is trained. `anchor` is left out where an emulator has a `ratio`, with preferences and for images;
    elsewhere it has its defaults. `none` switches it off.

    `method` is `sft` for answers, `dpo` or `kto` for preferences; `args` are the own arguments of its SFTConfig,
    DPOConfig or KTOConfig. `on` is what is trained on; if omitted, the emulator where there is one. With `original` an
    emulator is left unused; `auto` takes the faster of both on this machine. `way` holds the original in memory or
    streams it; no result depends on it.
    """

    method: Method = TrainSettings.default("method")
    on: Literal["emulator", "original", "auto"] | None = None
    way: Way = TrainSettings.default("way")
    lora: Lora = Lora()
    activations: Activations = Activations()
    anchor: Annotated[Anchor | None, BeforeValidator(none_word)] = None
    args: dict[str, Any] = Field(default={})


class Correct(Section):
    """The correction's clamp (lambda in the paper); None, written `none`, for no clamp; `auto` chooses per task.

    `default` is `auto` for tasks with validation data, and 3, the paper's, for others and for preferences.
    """

    limit: Annotated[PositiveFloat | Literal["auto", "default"] | None, BeforeValidator(checked_limit)] = (
        CorrectSettings.default("limit")
    )


class Polish(ExactSteps, Section):
    """Exact steps on the original after the correction. A task's validation data choose the best adapter.

    `activations` is how layer inputs are kept: exact, or as factors of a rank (a number, or a share of the width) plus
    two bits per value for their residual. With `packing`, short examples share rows of `max_length`.
    """


class Stream(OnDevice, Batched, Section):
    """How the passes over the original run. No field changes a result, so changing one never makes a step run again."""


class Task(Section):
    """One adapter: its data, and its differences from the `train` defaults. `ratio` asks for a smaller emulator."""

    train: DataSources
    validation: DataSources | None = None
    test: DataSources | None = None
    lora: Lora | None = None
    activations: Activations | None = None
    args: dict[str, Any] = Field(default={})
    anchor: Annotated[Anchor | None, BeforeValidator(none_word)] = None
    polish: Polish | None = None
    max_length: MaxLength | None = None
    ratio: SliceRatio = None
    merge: bool = False
