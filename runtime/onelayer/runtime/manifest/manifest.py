"""Reads one YAML file into checked, frozen settings: what to train, and how."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from onelayer.compiler.correct.settings import NO_CORRECTION, PAPER_LIMIT, chosen_limit
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import REFERENCE_BYTES, keep_ratio
from onelayer.compiler.faults import Fault, Location, faults_of, unknown_name, written
from onelayer.compiler.settings import Seeded
from onelayer.runtime.manifest.args import args_blocks, check_args, method_of
from onelayer.runtime.manifest.sections import (
    Anchor,
    Correct,
    Emulator,
    Images,
    Model,
    Polish,
    Refine,
    Samples,
    Section,
    Stream,
    Task,
    Training,
    overridden,
)
from onelayer.runtime.manifest.values import Folder, TaskName
from onelayer.runtime.manifest.yaml_file import read_yaml
from onelayer.runtime.training.trainer_args import METHODS, trainer_args_model


class Manifest(Seeded, Section):
    """A whole manifest, paths made absolute."""

    version: Literal[1]
    model: Model
    images: Images | None = None
    emulator: Emulator | None = None
    train: Training = Training()
    correct: Correct = Correct()
    polish: Polish | None = None
    samples: Samples | None = None
    tasks: Annotated[dict[TaskName, Task], Field(min_length=1)]
    direct: bool = False
    stream: Stream = Stream()
    output: Folder | None = None
    _path: Path = PrivateAttr(default=Path())

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    @property
    def may_be_coded(self) -> bool:
        """Whether the emulator may consist of codes: nothing asks for factors, and no task for a slice."""
        emulator = self.emulator
        if emulator is None or any(task.ratio is not None for task in self.tasks.values()):
            return False
        return emulator.form == "coded" or (
            emulator.form == "auto"
            and (emulator.ratio, emulator.factor_dtype, emulator.rank_allocation) == (None, None, None)
        )

    @property
    def prefers_codes(self) -> bool:
        """Whether an emulator of a share of bytes becomes codes if the linears are wide enough."""
        return self.may_be_coded and self.emulator is not None and self.emulator.prefers_codes

    def training(self, task_name: str) -> Training:
        """Return a task's training: its sections merged key by key over the defaults, with its own `max_length`.

        An argument set to null removes the default of that name.
        """
        task = self.tasks[task_name]
        lora = overridden(self.train.lora, task.lora)
        activations = overridden(self.train.activations, task.activations)
        merged = {**self.train.args, **task.args}
        args = {name: value for name, value in merged.items() if value is not None}
        return Training(
            method=self.train.method,
            lora=lora,
            activations=activations,
            anchor=self._anchor(task),
            on=self.train.on,
            way=self.train.way,
            args=args,
            max_length=task.max_length or self.train.max_length,
            max_image_pixels=self.train.max_image_pixels,
        )

    def _anchor(self, task: Task) -> Anchor | None:
        """Return a task's anchors: its own settings over the common ones; none if either says so last."""
        if "anchor" not in task.model_fields_set:
            return self.train.anchor
        return None if task.anchor is None else overridden(self.train.anchor or Anchor(), task.anchor)

    def limit(self, task_name: str) -> float | Literal["auto"] | None:
        """Return the limit of a task's correction. After anchors only held-out data can ask for one."""
        # The loss of chosen answers says little of an adapter that learned preferences.
        by_loss = self.train.method == "sft" and self.tasks[task_name].validation is not None and self.images is None
        unchosen = PAPER_LIMIT if self.training(task_name).anchor is None else NO_CORRECTION
        return chosen_limit(self.correct.limit, by_loss, unchosen)

    def polishing(self, task_name: str) -> Polish | None:
        """Return a task's exact steps, its own settings over the common ones; None if neither asks for any."""
        own = self.tasks[task_name].polish
        return self.polish if own is None else overridden(self.polish or Polish(), own)


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest; one `InputError` names every fault with its place in the file."""
    path = Path(path)
    document, faults = read_yaml(path)
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: a manifest is a mapping with version, model, emulator and tasks; see manifests/README.md"
        )
    for block, where in args_blocks(document):
        faults += check_args(block, where, method_of(document))
    try:
        context = {"folder": path.absolute().parent, "images": document.get("images") is not None}
        manifest = Manifest.model_validate(document, context=context)
    except ValidationError as error:
        faults += faults_of(error, Manifest, document)
    else:
        faults += _stopping_twice(manifest) + _nothing_to_choose_by(manifest) + _nothing_to_score(manifest)
        faults += _impossible_ratios(manifest) + _impossible_codes(manifest) + _nothing_to_train_on(manifest)
        faults += _impossible_preferences(manifest) + _impossible_images(manifest)
    if faults:
        raise InputError(f"{path}: " + "; ".join(f"{written(where)}: {text}" for where, text in faults))
    manifest = manifest.model_copy(update={"emulator": None}) if manifest.train.on == "original" else manifest
    manifest = _with_defaults(manifest)
    manifest._path = path.resolve()
    return manifest


def _with_defaults(manifest: Manifest) -> Manifest:
    """Say how adapters are trained on the emulator where the manifest does not (manifests/LOG.md, default pipeline).

    Answers are learned with anchors, and an emulator on which every task has anchors is not refined. With `ratio`, the
    published method, and for pipelines of images there are no anchors by default.
    """
    emulator, train = manifest.emulator, manifest.train
    if emulator is None or emulator.ratio is not None:
        return manifest
    if "anchor" not in train.model_fields_set and train.method == "sft" and manifest.images is None:
        manifest = manifest.model_copy(update={"train": train.model_copy(update={"anchor": Anchor()})})
    if "refine" not in emulator.model_fields_set:
        is_anchored = all(manifest.training(name).anchor is not None for name in manifest.tasks)
        refine = None if is_anchored else Refine()
        manifest = manifest.model_copy(update={"emulator": emulator.model_copy(update={"refine": refine})})
    return manifest


def _stopping_twice(manifest: Manifest) -> list[Fault]:
    """Find tasks whose merged arguments set the end of training twice: one would win silently."""
    return [
        (("tasks", name, "args"), "max_steps and num_train_epochs both set when to stop, set one of them to null")
        for name in manifest.tasks
        if {"max_steps", "num_train_epochs"} <= manifest.training(name).args.keys()
    ]


def _nothing_to_choose_by(manifest: Manifest) -> list[Fault]:
    """Find tasks without the data by which `correct.limit: auto` chooses."""
    return [
        (("tasks", name, "validation"), "is missing, `correct.limit: auto` chooses by the loss on held-out data")
        for name, task in manifest.tasks.items()
        if manifest.correct.limit == "auto" and task.validation is None
    ]


def _nothing_to_score(manifest: Manifest) -> list[Fault]:
    """Find tasks without the data that `eval_steps` asks to score."""
    return [
        (("tasks", name, "validation"), "is missing, `eval_steps` scores held-out data while training")
        for name, task in manifest.tasks.items()
        if manifest.training(name).args.get("eval_steps") is not None and task.validation is None
    ]


def _nothing_to_train_on(manifest: Manifest) -> list[Fault]:
    """Find what needs an emulator where the original is trained itself: anchors, or the word."""
    if manifest.emulator is None and manifest.train.on == "emulator":
        return [(("train", "on"), "there is no emulator, add one or set it to original")]
    if manifest.train.on == "auto" and (manifest.emulator is None or manifest.emulator.memory is None):
        return [(("train", "on"), "auto chooses between original and emulator for a card, give emulator.memory")]
    if manifest.emulator is not None and manifest.train.on != "original":
        return []
    places: list[tuple[Location, Anchor | None]] = [(("train", "anchor"), manifest.train.anchor)]
    places += [(("tasks", name, "anchor"), task.anchor) for name, task in manifest.tasks.items()]
    nothing = "there is no emulator, add one" if manifest.emulator is None else "train.on is original, change it"
    return [(where, f"{nothing} or leave the anchor out") for where, anchor in places if anchor is not None]


def _impossible_preferences(manifest: Manifest) -> list[Fault]:
    """Find what does not go with preferences."""
    if manifest.train.method == "sft":
        return []
    faults: list[Fault] = [
        (("tasks", name, "polish"), "exact steps learn answers, not preferences, leave it out")
        for name in manifest.tasks
        if manifest.polishing(name) is not None
    ]
    if manifest.correct.limit == "auto":
        faults.append((("correct", "limit"), "auto chooses by the loss on answers, give a number or none"))
    return faults


def _impossible_images(manifest: Manifest) -> list[Fault]:
    """Find what does not go with a diffusion pipeline."""
    if manifest.images is None:
        return [] if manifest.samples is None else [(("samples",), "only a pipeline of images draws, leave it out")]
    faults: list[Fault] = []
    if not Path(manifest.model.path).is_absolute():
        faults.append((("model", "path"), "images are encoded by a local pipeline, download it and give its directory"))
    if manifest.train.method != "sft":
        faults.append((("train", "method"), "a denoiser learns pictures, leave it out"))
    if manifest.correct.limit == "auto":
        faults.append((("correct", "limit"), "auto chooses by the loss on texts, give a number or none"))
    data: list[tuple[Location, tuple[Any, ...] | None]] = [
        (("tasks", name, part), getattr(task, part))
        for name, task in manifest.tasks.items()
        for part in ("train", "validation", "test")
    ]
    if manifest.emulator is not None:
        data.append((("emulator", "calibration", "data"), manifest.emulator.calibration.data))
    one = "a denoiser reads one folder, put all images into it"
    return faults + [(where, one) for where, folders in data if folders is not None and len(folders) > 1]


def _impossible_ratios(manifest: Manifest) -> list[Fault]:
    """Find ratios that are given twice, or that no slice of the emulator can have."""
    emulator = manifest.emulator
    faults: list[Fault] = []
    if emulator is not None:
        given = [name for name in ("ratio", "keep_bytes", "memory") if name in emulator.model_fields_set]
        given = [name for name in given if getattr(emulator, name) is not None]
        faults += [(("emulator", name), f"{given[0]} is given too, keep one of them") for name in given[1:]]
    for name, task in manifest.tasks.items():
        where: Location = ("tasks", name, "ratio")
        if task.ratio is None:
            continue
        if emulator is None:
            faults.append((where, "there is no emulator, add one or leave the ratio out"))
        elif manifest.train.on == "auto":
            faults.append((where, "a slice needs the emulator, set train.on to emulator or leave the ratio out"))
        elif (stored := _known_ratio(emulator)) is not None and task.ratio >= stored:
            faults.append((where, f"must be below {stored:.4g}, the ratio of the emulator that it is sliced from"))
    return faults


def _impossible_codes(manifest: Manifest) -> list[Fault]:
    """Find what does not go with an emulator of codes, or only with one."""
    emulator = manifest.emulator
    if emulator is None or emulator.form != "coded":
        return []
    faults: list[Fault] = []
    if emulator.ratio is not None:
        faults.append((("emulator", "ratio"), "the size of codes is a share of bytes, give keep_bytes"))
    return faults + [
        (("tasks", name, "ratio"), "an emulator of codes cannot be sliced, leave it out")
        for name, task in manifest.tasks.items()
        if task.ratio is not None
    ]


def _known_ratio(emulator: Emulator) -> float | None:
    """Return the emulator's ratio, None if only the original decides it."""
    if emulator.ratio is not None:
        return emulator.ratio
    if emulator.memory is not None or emulator.factor_dtype is None:
        return None
    return keep_ratio(emulator.share, emulator.factor_dtype, REFERENCE_BYTES)


def check_tasks(manifest: Manifest, tasks: list[str] | None) -> list[str]:
    """Return the chosen task names in the manifest's order, all for None. Raises `InputError` for an unknown one."""
    for name in tasks or []:
        if name not in manifest.tasks:
            raise InputError(f"{manifest.path}: tasks.{name}: {unknown_name(name, list(manifest.tasks), 'task')}")
    return [name for name in manifest.tasks if tasks is None or name in tasks]


def manifest_schema() -> dict[str, Any]:
    """Build the JSON Schema of a manifest, for editors that complete and check YAML."""
    schema = Manifest.model_json_schema()
    models = {method: trainer_args_model(method) for method in METHODS}
    known = [model.model_json_schema()["properties"] for model in models.values() if model is not None]
    if known:
        names = {name: field for fields in reversed(known) for name, field in fields.items()}
        schema["$defs"]["TrainerArgs"] = {"type": "object", "additionalProperties": False, "properties": names}
        for owner in ("Training", "Task"):
            schema["$defs"][owner]["properties"]["args"] = {"$ref": "#/$defs/TrainerArgs"}
    return schema
