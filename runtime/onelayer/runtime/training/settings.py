"""Turns training settings into checked arguments for PEFT's LoraConfig and TRL's SFTConfig; torch-free.

The few common settings have their own names (`TrainSettings`). Every other field of SFTConfig and LoraConfig can be
passed under its own name in `args` and `lora`, and is checked here before any weight is read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Strict,
    ValidationError,
    model_validator,
)

from onelayer.compiler.adapters.config import VARIANT_FIELDS, VARIANT_INITS
from onelayer.compiler.denoising.settings import TrainedNoise, Weighting
from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import faults_of, written
from onelayer.compiler.sampling.settings import TrainedPictures
from onelayer.compiler.settings import BatchSize, Lengths, Must, Option, Seeded
from onelayer.runtime.anchors.settings import ANCHOR_EVERY, BITS_RULE, AnchorBits
from onelayer.runtime.streamed.settings import Holding
from onelayer.runtime.training.trainer_args import (
    LEARNING_RATES,
    RENAMED_ARGS,
    TRAINER_DEFAULTS,
    Method,
    refused_args,
    reporter_fault,
    trainer_args_model,
)

INSTALL = "training needs the training extra; pip install 'onelayer[train]'"

Where = Literal["none", "layer", "sublayer"]
# A number of rows (strict, so that 1.0 is not read as one row), a share of the hidden size, or "auto" (measured).
ActivationRank = Annotated[int, Strict(), Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | Literal["auto"]
LoraRank = Annotated[PositiveInt, Field(description="Rank of the adapter.")]
LoraAlpha = Annotated[PositiveInt, Field(description="The adapter is scaled by alpha / rank.")]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(TrainedPictures, TrainedNoise, Lengths, Seeded, Holding):
    """The settings of a training; `lora` and `args` hold further fields of LoraConfig and SFTConfig."""

    method: Annotated[
        Method, Field(description="sft learns answers; dpo and kto learn preferences."), Option(metavar="sft|dpo|kto")
    ] = "sft"
    lora_rank: LoraRank = 8
    lora_alpha: LoraAlpha = 8
    target_modules: Annotated[
        str | list[str],
        Field(description="`all-linear`, names separated by commas, or a regular expression."),
        Option(metavar="NAMES", reader="modules"),
    ] = "all-linear"
    learning_rate: Annotated[
        PositiveFloat | None,
        Field(description="Learning rate; the default is meant for LoRA."),
        Option(default=", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())),
    ] = None
    max_steps: Annotated[PositiveInt | None, Field(description="Optimizer steps; give this or --epochs.")] = None
    epochs: Annotated[PositiveFloat | None, Field(description="Passes over the data; give this or --max-steps.")] = None
    batch_size: BatchSize = 8
    gradient_accumulation: Annotated[PositiveInt, Field(description="Batches per optimizer step.")] = 1
    warmup: Annotated[
        NonNegativeFloat | None,
        Field(description="Steps over which the learning rate rises, or their share below 1; none by default."),
        Option(metavar="STEPS|SHARE"),
    ] = None
    dropout: Annotated[Dropout, Field(description="Share of its inputs that the adapter drops.")] = 0.0
    eval_steps: Annotated[
        PositiveInt | None,
        Field(description="Optimizer steps between scores on --eval-data; without it they are scored at the end."),
    ] = None
    save_steps: Annotated[PositiveInt, Field(description="Optimizer steps between checkpoints.")] = 100
    report_to: Annotated[
        str | list[str],
        Field(description="Tools that follow the training, such as tensorboard or wandb, separated by commas."),
        Option(metavar="NAMES", reader="modules"),
    ] = "none"
    activations: Annotated[
        Where,
        Field(
            description="Compress what is stored for the backward pass: inputs of layers, or outputs of norms; "
            "the rest is recomputed."
        ),
        Option(metavar="none|layer|sublayer"),
    ] = "none"
    activation_rank: Annotated[
        ActivationRank,
        Field(
            description="Rank of stored factors, or its share of the hidden size; auto measures it. Their residual "
            "takes 2 bits per value."
        ),
        Option(metavar="K|SHARE|auto", reader="rank_or_auto"),
    ] = 0.125
    activation_report: Annotated[
        bool,
        Field(description="Measure the errors and the cosine of the gradient on the first batch."),
        Option(flags="--activation-report"),
    ] = False
    anchor_every: Annotated[
        PositiveInt | None,
        Field(
            description="Stream --model over the rows of the next K steps, and give each layer what it lacks of the "
            "original's answer."
        ),
        Option(metavar="K", default=f"{ANCHOR_EVERY} with --model"),
    ] = None
    anchor_bits: Annotated[
        AnchorBits, Field(description="Bits per value of what is given: 1, 2, 4, or 32 for float32."), Must(BITS_RULE)
    ] = 2
    resume: Annotated[
        bool, Field(description="Continue from the last checkpoint of --output."), Option(flags="--resume")
    ] = False
    lora: Annotated[dict[str, Any] | None, Field(description="Further fields of PEFT's LoraConfig.")] = None
    args: Annotated[dict[str, Any] | None, Field(description="Further fields of TRL's SFTConfig.")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise InputError("max_steps and epochs both set when to stop; give one of them")
        if self.activation_report and self.activations == "none":
            raise InputError("activation_report: nothing is compressed; set activations to layer or sublayer")
        return self

    @property
    def noise(self) -> dict[str, Any]:
        """The settings of noise, by name."""
        return {name: getattr(self, name) for name in TrainedNoise.model_fields}

    @classmethod
    def _refusal(cls, error: ValidationError, keywords: Mapping[str, Any]) -> str:
        return _first_fault(error, cls, keywords, "")


class TrainKeywords(TypedDict, total=False):
    """The keywords of `train_lora`."""

    method: str
    lora_rank: int
    lora_alpha: int
    target_modules: str | list[str]
    learning_rate: float | None
    max_steps: int | None
    epochs: float | None
    batch_size: int
    gradient_accumulation: int
    warmup: float | None
    dropout: float
    eval_steps: int | None
    save_steps: int
    report_to: str | list[str]
    max_length: int
    max_image_pixels: int | None
    seed: int
    weighting: Weighting
    prior_weight: float
    sample_prompt: list[str] | None
    sample_steps: int | None
    sample_resolution: int | None
    activations: str
    activation_rank: int | float | str
    activation_report: bool
    anchor_every: int | None
    anchor_bits: int
    way: str
    micro_batch_size: int | None
    cache_bytes: int
    resume: bool
    lora: dict[str, Any] | None
    args: dict[str, Any] | None


# Our names, and the equivalent names in SFTConfig and LoraConfig.
TRAINER_NAMES = {
    "learning_rate": "learning_rate",
    "max_steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "report_to": "report_to",
}
LORA_NAMES = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "target_modules": "target_modules",
    "dropout": "lora_dropout",
}
LORA_SHORT = {"alpha": "lora_alpha", "dropout": "lora_dropout"}


class LoraFields(BaseModel):
    """The fields of LoraConfig that keep the adapter W + s B A, the form that the correction is solved for."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)

    r: LoraRank
    lora_alpha: LoraAlpha
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    lora_dropout: Dropout
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveInt] = {}
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False


def lora_fields(settings: TrainSettings, compressed: Mapping[str, int]) -> LoraFields:
    """Return the fields of the LoraConfig. `compressed` names the modules that have no weight.

    Raises `InputError` for variants that are not plain LoRA, and for fields that LoraConfig does not have.
    """
    given = {LORA_SHORT.get(name, name): value for name, value in (settings.lora or {}).items()}
    for name, value in given.items():
        if name in VARIANT_FIELDS and value:
            raise InputError(
                f"lora.{name}: {VARIANT_FIELDS[name]} cannot be corrected for the original; train plain LoRA"
            )
    init = str(given.get("init_lora_weights")).lower()
    for prefix, variant in VARIANT_INITS.items():
        if init.startswith(prefix):
            raise InputError(
                f"lora.init_lora_weights: {variant} changes the base weight; use true, gaussian or orthogonal"
            )
    fields: LoraFields = _checked(LoraFields, {**_once(settings, given, LORA_NAMES, "lora"), **given}, "lora")
    for wanted in fields.modules_to_save or []:
        hit = next((name for name in compressed if name == wanted or name.endswith(f".{wanted}")), None)
        if hit is not None:
            raise InputError(
                f"lora.modules_to_save: {hit} is compressed in the emulator and cannot be saved for the original"
            )
    return fields


def trainer_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Return the arguments of the SFTConfig except its folder. Numbers in text form (YAML's 1e-4) become numbers."""
    given = dict(settings.args or {})
    for name, remedy in refused_args(settings.method).items():
        if name in given:
            raise InputError(f"args.{name}: cannot be set here, {remedy}")
    model = trainer_args_model(settings.method)
    if model is None:
        raise InputError(INSTALL)
    given = _checked(model, given, "args").model_dump(exclude_unset=True)
    given = {RENAMED_ARGS.get(name, name): value for name, value in given.items()}
    for where, tools in (("--report-to ", settings.report_to), ("args.report_to: ", given.get("report_to"))):
        if (fault := reporter_fault(tools)) is not None:
            raise InputError(f"{where}{fault}")
    if settings.activations != "none" and given.get("activation_checkpointing"):
        raise InputError(
            f"args.activation_checkpointing: activations={settings.activations} recomputes layers already; leave it out"
        )
    own = {name: value for name, value in _once(settings, given, TRAINER_NAMES, "args").items() if value is not None}
    fixed = {"max_length": settings.max_length, "seed": settings.seed, "disable_tqdm": True}
    if settings.method != "sft" and settings.dropout and given.get("disable_dropout") is not False:
        raise InputError("--dropout: dpo and kto train without; leave it out, or set args.disable_dropout to false")
    return {**TRAINER_DEFAULTS, "learning_rate": LEARNING_RATES[settings.method], **own, **given, **fixed}


def _once(settings: TrainSettings, given: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return our settings under their foreign names. Refuse one that is set differently in both places."""
    for ours, theirs in names.items():
        value, default = getattr(settings, ours), TrainSettings.default(ours)
        if theirs in given and value not in (default, given[theirs]):
            raise InputError(f"{ours} is {value!r} and {where}.{theirs} is {given[theirs]!r}; give it once")
    return {theirs: getattr(settings, ours) for ours, theirs in names.items()}


def _checked(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """Validate values, or raise an `InputError` naming the first fault as `where.field`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(_first_fault(error, model, values, where)) from None


def _first_fault(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], where: str) -> str:
    location, text = faults_of(error, model, dict(values))[0]
    return f"{written((where, *location) if where else location)}: {text}"
