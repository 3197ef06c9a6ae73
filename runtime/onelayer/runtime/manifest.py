"""One YAML file in, checked and frozen settings out: what a person wants trained, and how."""

import re
from pathlib import Path
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
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)

from onelayer.compiler.errors import InputError
from onelayer.compiler.examples import KINDS, SUFFIXES
from onelayer.runtime.manifest_reader import Fault, Location, faults_of, read_yaml, unknown_name, written
from onelayer.runtime.train_settings import REFUSED_ARGS, ActivationRank, Where
from onelayer.runtime.trainer_args import trainer_args_model

# Arguments of SFTConfig that a manifest decides elsewhere, with the place; beside those that training always refuses.
_RESERVED_ARGS = {
    **{name: f"cannot be set here, {remedy}" for name, remedy in REFUSED_ARGS.items()},
    "output_dir": "not here, the store decides where results go",
    "resume_from_checkpoint": "not here, an interrupted training is resumed by running the manifest again",
    "seed": "not here, set the manifest's top-level `seed`",
    "max_length": "not here, set `max_length` under `train` or the task",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _local(text: str, info: ValidationInfo) -> str | None:
    """The absolute path of something that exists relative to the manifest's folder, else None."""
    base: Path = (info.context or {}).get("folder", Path.cwd())
    path = base / Path(text).expanduser()
    return str(path.resolve()) if path.exists() else None


def _data_source(text: str, info: ValidationInfo) -> str:
    local = _local(text, info)
    if local is not None:
        if not Path(local).is_dir() and Path(local).suffix not in SUFFIXES:
            raise ValueError(f"{text}: unknown kind of data, use a {KINDS} file or a directory of them")
        return local
    if Path(text).suffix not in SUFFIXES and "/" in text and _HUB_ID.fullmatch(text) and not Path(text).exists():
        return text
    raise ValueError(f"{text}: no such file in the manifest's folder, paths are relative to the manifest")


def _model_source(text: str, info: ValidationInfo) -> str:
    local = _local(text, info)
    if local is not None:
        return local
    if _HUB_ID.fullmatch(text) and not Path(text).exists():
        return text
    raise ValueError(f"{text}: no such directory in the manifest's folder, and not a Hub id like org/name")


def _limit(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value not in ("none", "auto")):
        raise ValueError("write a number, `none` for no limit, or `auto`")
    return None if value == "none" else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _modules(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("write `all-linear`, a regular expression or a list of module names")
    return value


DataSource = Annotated[str, AfterValidator(_data_source)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=_Section)


def _overridden(defaults: SectionT, own: SectionT | None) -> SectionT:
    """The defaults with what a task sets itself."""
    if own is None:
        return defaults
    return defaults.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Model(_Section):
    """The original model: a directory, or a Hub id with an optional revision."""

    path: Annotated[str, AfterValidator(_model_source)]
    revision: str | None = None


class Calibration(_Section):
    """What the compiler looks at: data, how many examples of it, cut at how many tokens."""

    data: Annotated[tuple[DataSource, ...], BeforeValidator(_as_list), Field(min_length=1)]
    samples: PositiveInt = 64
    max_length: Annotated[int, Field(ge=2)] = 512


class Emulator(_Section):
    """The compact stand-in; `ratio` is the kept share of each linear's parameters."""

    calibration: Calibration
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25


class Lora(_Section):
    """The adapter, as PEFT means it; `target_modules` is "all-linear", a regular expression or a list."""

    r: PositiveInt = 8
    alpha: PositiveInt = 8
    target_modules: Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_modules)] = (
        "all-linear"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}


class Activations(_Section):
    """What is stored for the backward pass: `where` to compress it, and to which rank (number, share or `auto`)."""

    where: Where = "none"
    rank: ActivationRank = 0.125


class Training(_Section):
    """How an adapter is trained; `args` are SFTConfig's own arguments."""

    lora: Lora = Lora()
    activations: Activations = Activations()
    args: dict[str, Any] = {}
    max_length: Annotated[int, Field(ge=2)] = 512


class Correct(_Section):
    """The correction's clamp (lambda in the paper); None, written `none`, for no clamp; `auto` chooses per task."""

    limit: Annotated[PositiveFloat | Literal["auto"] | None, BeforeValidator(_limit)] = 3.0


class Stream(_Section):
    """How the passes over the original run; nothing here changes a result, so nothing here makes a step run again."""

    device: str | None = None
    batch_size: PositiveInt = 1


class Task(_Section):
    """One adapter: its data, and what differs from the `train` defaults."""

    train: DataSource
    validation: DataSource | None = None
    test: DataSource | None = None
    lora: Lora | None = None
    activations: Activations | None = None
    args: dict[str, Any] = {}
    max_length: Annotated[int | None, Field(ge=2)] = None
    merge: bool = False


class Manifest(_Section):
    """A whole manifest, paths made absolute."""

    version: Literal[1]
    model: Model
    emulator: Emulator
    train: Training = Training()
    correct: Correct = Correct()
    tasks: Annotated[dict[TaskName, Task], Field(min_length=1)]
    direct: bool = False
    seed: NonNegativeInt = 0
    stream: Stream = Stream()
    _path: Path = PrivateAttr(default=Path())

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    def training(self, task_name: str) -> Training:
        """A task's training: sections merged key by key over the defaults, `max_length` replaced.

        An argument set to null takes the default of that name away.
        """
        task = self.tasks[task_name]
        lora = _overridden(self.train.lora, task.lora)
        activations = _overridden(self.train.activations, task.activations)
        merged = {**self.train.args, **task.args}
        args = {name: value for name, value in merged.items() if value is not None}
        return Training(
            lora=lora, activations=activations, args=args, max_length=task.max_length or self.train.max_length
        )


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest; one `InputError` names every fault with its place in the file."""
    path = Path(path)
    document, faults = read_yaml(path)
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: a manifest is a mapping with version, model, emulator and tasks; see manifests/README.md"
        )
    for block, where in _args_blocks(document):
        faults += _check_args(block, where)
    try:
        manifest = Manifest.model_validate(document, context={"folder": path.absolute().parent})
    except ValidationError as error:
        faults += faults_of(error, Manifest, document)
    else:
        faults += _stopping_twice(manifest) + _nothing_to_choose_by(manifest)
    if faults:
        raise InputError(f"{path}: " + "; ".join(f"{written(where)}: {text}" for where, text in faults))
    manifest._path = path.resolve()
    return manifest


def _args_blocks(document: dict[str, Any]) -> list[tuple[dict[str, Any], Location]]:
    """Every `args:` mapping of a document that is not checked yet, with its place."""
    tasks = document.get("tasks")
    owners: list[tuple[Any, Location]] = [(document.get("train"), ("train",))]
    owners += [(task, ("tasks", name)) for name, task in tasks.items()] if isinstance(tasks, dict) else []
    return [
        (owner["args"], (*where, "args"))
        for owner, where in owners
        if isinstance(owner, dict) and isinstance(owner.get("args"), dict)
    ]


def _check_args(block: dict[str, Any], where: Location) -> list[Fault]:
    """Check one `args:` mapping against SFTConfig and put the coerced values in its place."""
    faults: list[Fault] = [((*where, name), _RESERVED_ARGS[name]) for name in block if name in _RESERVED_ARGS]
    args_model = trainer_args_model()
    if args_model is None:  # without the training extra no name can be checked; the train step says what to install
        return faults
    allowed = {name: value for name, value in block.items() if name not in _RESERVED_ARGS}
    try:
        block.update(args_model.model_validate(allowed).model_dump(exclude_unset=True))
    except ValidationError as error:
        faults += [((*where, *place), text) for place, text in faults_of(error, args_model, allowed)]
    return faults


def _stopping_twice(manifest: Manifest) -> list[Fault]:
    """A fault per task whose merged arguments say twice when training ends: one would win without a word."""
    return [
        (("tasks", name, "args"), "max_steps and num_train_epochs both say when to stop, set one of them to null")
        for name in manifest.tasks
        if {"max_steps", "num_train_epochs"} <= manifest.training(name).args.keys()
    ]


def _nothing_to_choose_by(manifest: Manifest) -> list[Fault]:
    """A fault per task without the data by which `correct.limit: auto` chooses."""
    return [
        (("tasks", name, "validation"), "is missing, `correct.limit: auto` chooses by the loss on held-out data")
        for name, task in manifest.tasks.items()
        if manifest.correct.limit == "auto" and task.validation is None
    ]


def check_tasks(manifest: Manifest, tasks: list[str] | None) -> list[str]:
    """The chosen task names in the manifest's order, all of them for None; `InputError` for an unknown one."""
    for name in tasks or []:
        if name not in manifest.tasks:
            raise InputError(f"{manifest.path}: tasks.{name}: {unknown_name(name, list(manifest.tasks), 'task')}")
    return [name for name in manifest.tasks if tasks is None or name in tasks]


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of a manifest, for editors that complete and check YAML."""
    schema = Manifest.model_json_schema()
    args_model = trainer_args_model()
    if args_model is not None:
        schema["$defs"]["TrainerArgs"] = args_model.model_json_schema()
        for owner in ("Training", "Task"):
            schema["$defs"][owner]["properties"]["args"] = {"$ref": "#/$defs/TrainerArgs"}
    return schema
