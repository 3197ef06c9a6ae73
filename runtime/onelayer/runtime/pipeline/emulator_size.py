"""Chooses the size of a manifest's emulator, from a ratio, a share of bytes or a memory budget, and whether it pays."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import FACTOR_DTYPES, within_bytes
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.manifest.sections import Emulator
from onelayer.runtime.pipeline.step import model_source
from onelayer.runtime.planning.choice import (
    EVERY_FORM,
    SMALLEST_RATIO,
    USABLE_SHARE,
    Choice,
    Size,
    best_ratio,
    best_stored,
    limiting_pass,
)
from onelayer.runtime.planning.coded import coded_emulator
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import Speed, seconds_at, try_speed
from onelayer.runtime.planning.train_memory import PlannedRun, Stored, emulator_bytes, train_memory
from onelayer.runtime.planning.ways import WayCost, way_costs
from onelayer.runtime.store.store import ArtifactStore
from onelayer.runtime.training.settings import TrainSettings

# Raise it by hand when the planner's choice changes for the same shapes and settings.
PLANNER_VERSION = 7
DEFAULT_BATCH_SIZE = TrainSettings.default("batch_size")
AUTO_RANK = 0.125  # the rank to plan with if it will be measured
TrainedOn = Literal["emulator", "original"]


def planned_run(manifest: Manifest, task: str) -> PlannedRun:
    """Describe to the planner what will run for a task. If memory decides the size, it is part of a compile's key."""
    training, emulator, batch = manifest.training(task), manifest.emulator, manifest.stream.batch_size
    where, rank = training.activations.where, training.activations.rank
    share = None if where == "none" else AUTO_RANK if rank == "auto" else rank
    batch_size = int(training.args.get("per_device_train_batch_size") or DEFAULT_BATCH_SIZE)
    trained = PlannedRun(batch_size, training.max_length, training.lora.r, where, share, allocation="uniform")
    if emulator is None:
        return trained
    refinement, longest = emulator.refine, emulator.calibration.max_length
    return replace(
        trained,
        allocation=emulator.allocation,
        is_sliced=any(task.ratio is not None for task in manifest.tasks.values()),
        compile_tokens=batch * longest,
        refine_tokens=0 if refinement is None else refinement.batch_size * longest,
        refine_backward=refinement is not None and refinement.backward,
        compile_backward=emulator.backward is True,
        scored_tokens=batch * training.max_length if manifest.limit(task) == "auto" else 0,
        anchored=training.anchor is not None,
    )


def _planned_tasks(manifest: Manifest) -> list[str]:
    """List the tasks that train on the common emulator; if there are none, all tasks."""
    return [name for name, task in manifest.tasks.items() if task.ratio is None] or list(manifest.tasks)


def runs_in_key(manifest: Manifest) -> list[dict[str, Any]]:
    """List the distinct planned runs of the tasks, in a fixed order, as a compile's key holds them."""
    runs = {planned_run(manifest, name) for name in _planned_tasks(manifest)}
    return sorted((_in_key(run) for run in runs), key=str)


def _in_key(run: PlannedRun) -> dict[str, Any]:
    """Name a run's fields as stored keys do: `is_sliced` was `is_cut` when the first were made.

    `coded` is what the size decides, not what it is decided by. The two passes back and the anchors are left out if
    there are none, which keeps the keys from before them.
    """
    fields = asdict(run)
    del fields["coded"]
    for name in ("refine_backward", "compile_backward", "anchored"):
        if not fields[name]:
            del fields[name]
    return {"is_cut" if name == "is_sliced" else name: value for name, value in fields.items()}


def emulator_size(manifest: Manifest, directory: Path) -> Size:
    """Choose the size of the common emulator. Raises `InputError` if none fits the manifest's memory."""
    emulator = manifest.emulator
    assert emulator is not None
    if emulator.ratio is not None:
        return Size(emulator.ratio, emulator.factor_dtype)
    return size_of_shapes(manifest, emulator, shapes_of_examples(manifest, directory))


def shapes_of_examples(manifest: Manifest, directory: Path) -> ModelShapes:
    """Read a model's shapes, with the images or sound of the shortest examples that a pass reads."""
    lengths = [manifest.training(name).max_length for name in manifest.tasks]
    if manifest.emulator is not None:
        lengths.append(manifest.emulator.calibration.max_length)
    side = None if manifest.images is None else manifest.images.resolution
    shapes = shapes_from_headers(directory, image_side=side)
    return shapes.at_length(shapes.positions or min(lengths))


def of_pictures(run: PlannedRun, shapes: ModelShapes) -> PlannedRun:
    """Return a run as a denoiser computes it: one picture with its prompt at a time."""
    positions = shapes.positions
    if positions is None:
        return run
    refined = None if run.refine_tokens is None else positions * bool(run.refine_tokens)
    return replace(run, batch_size=1, max_length=positions, compile_tokens=positions, refine_tokens=refined)


def size_of_shapes(manifest: Manifest, emulator: Emulator, shapes: ModelShapes) -> Size:
    """Return the size that the manifest gives, or the size that its share of bytes or its memory implies."""
    dtype = emulator.factor_dtype
    if emulator.ratio is not None:
        return Size(emulator.ratio, dtype)
    if emulator.memory is None:
        if manifest.prefers_codes:
            size = Size(within_bytes(emulator.share, RESIDUAL_DTYPE, shapes.value_bytes)[0], RESIDUAL_DTYPE, coded=True)
            if emulator.form == "coded" or coded_emulator(shapes, size.ratio) is not None:
                return size
        return Size(*within_bytes(emulator.share, dtype, shapes.value_bytes))
    allowed = _allowed(manifest, emulator)
    found = {each: _ratios(manifest, shapes, emulator.memory, each) for each in allowed}
    chosen = allowed[0] if len(allowed) == 1 else best_stored({each: _common(found[each]) for each in allowed})
    ratio = _common(found[chosen])
    if ratio is None:
        task = next(name for name, largest in found[chosen].items() if largest is None)
        smallest = best_ratio(shapes, planned_run(manifest, task), emulator.memory, chosen)
        if smallest.memory.peak <= USABLE_SHARE * emulator.memory:
            limit = limiting_pass(shapes, smallest, emulator.memory)
            raise InputError(
                f"{manifest.path}: emulator.memory: too little for {limit}; lower stream.batch_size, "
                "emulator.refine.batch_size or max_length of calibration and tasks, or leave the refinement out"
            )
        raise InputError(
            f"{manifest.path}: emulator.memory: tasks.{task} cannot be trained in it with any emulator; lower its "
            "max_length or per_device_train_batch_size, or compress its activations"
        )
    if chosen == "coded":
        return Size(ratio, RESIDUAL_DTYPE, coded=True)
    return Size(ratio, dtype or (None if chosen == "bf16" else chosen))


def _allowed(manifest: Manifest, emulator: Emulator) -> tuple[Stored, ...]:
    """List the ways to store linears that the manifest leaves open."""
    if emulator.form == "coded":
        return ("coded",)
    if emulator.factor_dtype is not None:
        return (emulator.factor_dtype,)
    return EVERY_FORM if manifest.may_be_coded else FACTOR_DTYPES


def _ratios(manifest: Manifest, shapes: ModelShapes, memory_bytes: int, dtype: Stored) -> dict[str, float | None]:
    """Find the largest ratio with which each task can be trained."""
    runs = {name: of_pictures(planned_run(manifest, name), shapes) for name in _planned_tasks(manifest)}
    return {name: best_ratio(shapes, run, memory_bytes, dtype).ratio for name, run in runs.items()}


def _common(ratios: Mapping[str, float | None]) -> float | None:
    """Return the largest ratio with which all can be trained."""
    known = [ratio for ratio in ratios.values() if ratio is not None]
    return min(known) if len(known) == len(ratios) else None


def decided(manifest: Manifest, store: ArtifactStore, measure: bool) -> tuple[Manifest, str | None]:
    """Return a manifest that says what is trained on, and a note about it where `train.on` is auto.

    The faster of emulator and original is taken, at speeds that are measured on this machine once: the decision is kept
    in the store, since a second measurement could turn it over. Without `measure` an open decision stays open: a dry
    run reads no weights and does not import torch.
    """
    if manifest.train.on != "auto":
        return manifest, None
    settings = manifest.model_dump(mode="json", exclude={"output", "stream"})
    file = store.home / "decisions" / f"{sha256_json(settings)[:32]}.json"
    on = _kept(file)
    if on is None and not measure:
        return manifest, "train.on is auto: the run measures this machine first, shown is training on the emulator"
    if on is None:
        on = _decide(manifest, file)
    train = manifest.train.model_copy(update={"on": on})
    emulator = manifest.emulator if on == "emulator" else None
    return manifest.model_copy(update={"train": train, "emulator": emulator}), f"train.on is auto: the {on} is faster"


def _decide(manifest: Manifest, file: Path) -> TrainedOn:
    """Measure and keep the decision in a file. Of runs that begin together one measures, and the others wait for it."""
    from filelock import FileLock

    model = model_source(manifest)
    directory = resolve_model(model.text, model.revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if (on := _kept(file)) is None:
            on = _faster(manifest, directory)
            write_json(file, {"on": on})
    return on


def _kept(file: Path) -> TrainedOn | None:
    """Read a decision; None if there is none that can be read."""
    try:
        found = read_json(file)["on"]
    except (InputError, KeyError, TypeError):
        return None
    return next((on for on in get_args(TrainedOn) if on == found), None)


def _faster(manifest: Manifest, directory: Path) -> TrainedOn:
    """Compare the seconds of all tasks on the emulator with those on the original. Raises `InputError` if none fits.

    An emulator is made once for all. Of tasks that do not set `max_steps` only a step is compared.
    """
    emulator, shapes = manifest.emulator, shapes_from_headers(directory)
    assert emulator is not None
    assert emulator.memory is not None
    speed = try_speed(directory, shapes, max(planned_run(manifest, task).tokens for task in manifest.tasks))
    try:
        size = size_of_shapes(manifest, emulator, shapes)
    except InputError:
        least = Size(SMALLEST_RATIO, None)
        each = [_exact_seconds(manifest, task, _ways(manifest, task, shapes, least, speed)) for task in manifest.tasks]
        if None in each:
            raise
        return "original"
    counts = [manifest.training(task).args.get("max_steps") for task in manifest.tasks]
    emulated = exact = 0.0
    for number, task in enumerate(manifest.tasks):
        ways = _ways(manifest, task, shapes, size, speed)
        taken = ways["emulator" if manifest.training(task).anchor is None else "anchored"]
        steps = None if None in counts else counts[number]
        seconds = taken.seconds(steps)
        original = _exact_seconds(manifest, task, ways, steps)
        if seconds is None or original is None:
            return "emulator"
        once = taken.once_seconds if number and steps is not None else None
        emulated, exact = emulated + seconds - (once or 0.0), exact + original
    return "emulator" if emulated < exact else "original"


def _ways(manifest: Manifest, task: str, shapes: ModelShapes, size: Size, speed: Speed) -> dict[str, WayCost]:
    """Return the costs of all ways to train a task, by their names."""
    emulator, run = manifest.emulator, replace(planned_run(manifest, task), coded=size.coded)
    assert emulator is not None
    assert emulator.memory is not None
    memory = train_memory(shapes, emulator_bytes(shapes, size.ratio, size.stored), run)
    samples, polished = emulator.calibration.samples, run.batch_size
    seconds = seconds_at(speed, shapes, run, ratio=size.ratio, samples=samples, polish_batch=polished)
    choice = Choice(run, size.stored, size.ratio, memory)
    return {way.way: way for way in way_costs(shapes, choice, emulator.memory, None, speed, seconds)}


def _exact_seconds(
    manifest: Manifest, task: str, ways: Mapping[str, WayCost], steps: int | None = None
) -> float | None:
    """Return the seconds on the original as `train.way` holds it; None if it does not fit."""
    wanted = manifest.training(task).way
    names = ("resident", "streamed") if wanted == "auto" else (wanted,)
    return next((ways[name].seconds(steps) for name in names if ways[name].fits), None)
