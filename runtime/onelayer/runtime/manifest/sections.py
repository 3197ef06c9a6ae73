"""The sections of a manifest, as pydantic models: the single source of what may be written, and of the JSON Schema."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from onelayer.compiler.factors.ranks import Allocation
from onelayer.compiler.factors.stored_forms import DEFAULT_KEEP_BYTES
from onelayer.runtime.manifest.values import (
    DataSource,
    Size,
    as_list,
    checked_limit,
    checked_modules,
    model_source,
    none_word,
)
from onelayer.runtime.training.settings import ActivationRank, Where

TargetModules = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(checked_modules)]


class Section(BaseModel):
    """A mapping of the file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class Calibration(Section):
    """What the compiler looks at: data, how many examples of it, cut at how many tokens."""

    data: Annotated[tuple[DataSource, ...], BeforeValidator(as_list), Field(min_length=1)]
    samples: PositiveInt = 64
    max_length: Annotated[int, Field(ge=2)] = 512


class Refine(Section):
    """Training of the emulator's factors, layer by layer, against the original; the rate is relative to their size.

    `samples` of the calibration data are used, whatever the compile used, `batch_size` of them computed at once.
    """

    samples: PositiveInt = 256
    batch_size: PositiveInt = 1
    steps: PositiveInt = 100
    step_samples: PositiveInt = 8
    learning_rate: PositiveFloat = 0.01


class Emulator(Section):
    """The compact stand-in, of a size that is said in one of three ways.

    `keep_bytes` is the kept share of each linear's bytes at 16 bits, 0.25 where nothing is said; `memory` asks for the
    best emulator with which every task can be trained on a device of that size; `ratio` is the kept share of each
    linear's parameters, as in the paper. `factor_dtype` is how factors are stored: left out, the original's dtype with
    a ratio, and else the best for the bytes. `rank_allocation`, left out, is uniform with a ratio and else by spectrum.
    `refine` trains the factors afterwards, on the calibration data: left out, as that is by default but with a ratio;
    `none` for not at all.
    """

    calibration: Calibration
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep_bytes: Annotated[float, Field(gt=0, lt=1)] | None = None
    memory: Size | None = None
    factor_dtype: Literal["bf16", "int8", "nf4"] | None = None
    rank_allocation: Allocation | None = None
    refine: Annotated[Refine | None, BeforeValidator(none_word)] = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_not_none(cls, written: Any) -> Any:
        """`refine:` with nothing behind it is left out, as everywhere; only the word `none` goes without."""
        if isinstance(written, dict) and written.get("refine", "") is None:
            return {name: value for name, value in written.items() if name != "refine"}
        return written

    @property
    def share(self) -> float:
        """The kept share of bytes, where neither ratio nor memory say how much is kept."""
        return self.keep_bytes or DEFAULT_KEEP_BYTES

    @property
    def refinement(self) -> Refine | None:
        """How the factors are trained behind the compile, if they are."""
        if "refine" in self.model_fields_set or self.ratio is not None:
            return self.refine
        return Refine()

    @property
    def allocation(self) -> Allocation:
        """How ranks are chosen."""
        return self.rank_allocation or ("spectrum" if self.ratio is None else "uniform")


class Lora(Section):
    """The adapter, as PEFT means it; `target_modules` is "all-linear", a regular expression or a list."""

    r: PositiveInt = 8
    alpha: PositiveInt = 8
    target_modules: TargetModules = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}


class Activations(Section):
    """What is stored for the backward pass: `where` to compress it, and to which rank (number, share or `auto`).

    What factors of this rank leave is stored with two bits a value.
    """

    where: Where = "none"
    rank: ActivationRank = 0.125


class Training(Section):
    """How an adapter is trained; `args` are SFTConfig's own arguments."""

    lora: Lora = Lora()
    activations: Activations = Activations()
    args: dict[str, Any] = {}
    max_length: Annotated[int, Field(ge=2)] = 512


class Correct(Section):
    """The correction's clamp (lambda in the paper); None, written `none`, for no clamp; `auto` chooses per task.

    `default` is `auto` for tasks with validation data, and 3, the paper's, for others.
    """

    limit: Annotated[PositiveFloat | Literal["auto", "default"] | None, BeforeValidator(checked_limit)] = "default"


class Polish(Section):
    """Exact steps on the original behind the correction. A task's validation data choose the best adapter.

    `activations` is how layer inputs are kept: exact, or as factors of a rank (a number, or a share of the width) and
    two bits for what they leave of each value. With `packing`, short examples share rows of
    `max_length`.
    """

    steps: PositiveInt = 10
    batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 0
    max_gradient_norm: PositiveFloat = 1.0
    eval_steps: PositiveInt = 1
    activations: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | Literal["exact"] = "exact"
    packing: bool = False


class Stream(Section):
    """How the passes over the original run; nothing here changes a result, so nothing here makes a step run again."""

    device: str | None = None
    batch_size: PositiveInt = 1


class Task(Section):
    """One adapter: its data, and what differs from the `train` defaults; `ratio` asks for a smaller emulator."""

    train: DataSource
    validation: DataSource | None = None
    test: DataSource | None = None
    lora: Lora | None = None
    activations: Activations | None = None
    args: dict[str, Any] = {}
    polish: Polish | None = None
    max_length: Annotated[int | None, Field(ge=2)] = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    merge: bool = False
