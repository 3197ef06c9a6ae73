"""Chooses the size of a manifest's emulator, from a ratio, a share of bytes or a memory budget."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import FACTOR_DTYPES, within_bytes
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.manifest.sections import Emulator
from onelayer.runtime.planning.choice import EVERY_FORM, USABLE_SHARE, Size, best_ratio, best_stored, limiting_pass
from onelayer.runtime.planning.coded import coded_emulator
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.train_memory import PlannedRun, Stored
from onelayer.runtime.training.settings import TrainSettings

# Raise it by hand when the planner's choice changes for the same shapes and settings.
PLANNER_VERSION = 7
DEFAULT_BATCH_SIZE = TrainSettings.default("batch_size")
AUTO_RANK = 0.125  # the rank to plan with if it will be measured


def planned_run(manifest: Manifest, task: str) -> PlannedRun:
    """Describe to the planner what will run for a task. If memory decides the size, it is part of a compile's key."""
    training, emulator, batch = manifest.training(task), manifest.emulator, manifest.stream.batch_size
    where, rank = training.activations.where, training.activations.rank
    share = None if where == "none" else AUTO_RANK if rank == "auto" else rank
    batch_size = int(training.args.get("per_device_train_batch_size") or DEFAULT_BATCH_SIZE)
    trained = PlannedRun(batch_size, training.max_length, training.lora.r, where, share, allocation="uniform")
    if emulator is None:
        return trained
    refinement, longest = emulator.refinement, emulator.calibration.max_length
    return replace(
        trained,
        allocation=emulator.allocation,
        is_sliced=any(task.ratio is not None for task in manifest.tasks.values()),
        compile_tokens=batch * longest,
        refine_tokens=0 if refinement is None else refinement.batch_size * longest,
        refine_backward=refinement is not None and refinement.backward,
        compile_backward=emulator.backward is True,
        scored_tokens=batch * training.max_length if manifest.limit(task) == "auto" else 0,
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

    `coded` is what the size decides, not what it is decided by. The two passes back are left out if they do not run,
    which keeps the keys from before them.
    """
    fields = asdict(run)
    del fields["coded"]
    for name in ("refine_backward", "compile_backward"):
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
    return shapes_from_headers(directory).at_length(min(lengths))


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
    runs = {name: planned_run(manifest, name) for name in _planned_tasks(manifest)}
    return {name: best_ratio(shapes, run, memory_bytes, dtype).ratio for name, run in runs.items()}


def _common(ratios: Mapping[str, float | None]) -> float | None:
    """Return the largest ratio with which all can be trained."""
    known = [ratio for ratio in ratios.values() if ratio is not None]
    return min(known) if len(known) == len(ratios) else None
