"""A manifest and a model's shapes in; the emulator that its memory budget allows, and what each step costs, out.

Torch-free: `onelayer run --dry-run` says these things before anything is computed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from onelayer.compiler.errors import InputError
from onelayer.compiler.factor_dtypes import FactorDtype, best_of, within_bytes
from onelayer.compiler.measure import Result
from onelayer.compiler.ranks import widest_ratio
from onelayer.compiler.shapes import ModelShapes, shapes_from_headers
from onelayer.runtime.manifest import Manifest
from onelayer.runtime.manifest_sections import Emulator
from onelayer.runtime.plan_choice import USABLE_SHARE, best_ratio, kind_of, limit_of
from onelayer.runtime.plan_memory import (
    Setting,
    compile_bytes,
    emulator_bytes,
    train_memory,
)
from onelayer.runtime.plan_parts import MASTER_BYTES, lora_parameters
from onelayer.runtime.plan_passes import pass_bytes, polish_bytes, refine_bytes

# Raised by hand when the planner starts to choose otherwise for the same shapes and settings.
PLANNER_VERSION = 6
DEFAULT_BATCH_SIZE = 8
AUTO_RANK = 0.125  # what is planned with where the rank will be measured


class StepCosts(Result):
    """Bytes that a step reads and writes, and its predicted peak on the device; None where they cannot be told."""

    read_bytes: int | None = None
    write_bytes: int | None = None
    peak_bytes: int | None = None


def setting_of(manifest: Manifest, task: str) -> Setting:
    """All that will run for a task, as the planner sees it; a compile's key holds it, where memory decides the size."""
    training, emulator, batch = manifest.training(task), manifest.emulator, manifest.stream.batch_size
    where, rank = training.activations.where, training.activations.rank
    share = None if where == "none" else AUTO_RANK if rank == "auto" else rank
    batch_size = int(training.args.get("per_device_train_batch_size") or DEFAULT_BATCH_SIZE)
    trained = Setting(batch_size, training.max_length, training.lora.r, where, share, allocation="uniform")
    if emulator is None:
        return trained
    refinement, longest = emulator.refinement, emulator.calibration.max_length
    return replace(
        trained,
        allocation=emulator.allocation,
        is_cut=any(task.ratio is not None for task in manifest.tasks.values()),
        compile_tokens=batch * longest,
        refine_tokens=0 if refinement is None else refinement.batch_size * longest,
        scored_tokens=batch * training.max_length if manifest.limit(task) == "auto" else 0,
    )


def _planned_tasks(manifest: Manifest) -> list[str]:
    """Those whose training the common emulator must fit; one with a ratio of its own takes care of itself."""
    return [name for name, task in manifest.tasks.items() if task.ratio is None] or list(manifest.tasks)


def planned_settings(manifest: Manifest) -> list[dict[str, Any]]:
    """The different settings among the tasks, in a fixed order."""
    settings = {setting_of(manifest, name) for name in _planned_tasks(manifest)}
    return sorted((asdict(setting) for setting in settings), key=str)


@dataclass(frozen=True)
class Size:
    """What a compile is told of an emulator's size; None is the original's own dtype."""

    ratio: float
    factor_dtype: FactorDtype | None


def emulator_size(manifest: Manifest, directory: Path) -> Size:
    """Of the common emulator. Raises `InputError` where none fits the manifest's memory."""
    emulator = manifest.emulator
    assert emulator is not None
    if emulator.ratio is not None:
        return Size(emulator.ratio, emulator.factor_dtype)
    return size_of_shapes(manifest, emulator, shapes_from_headers(directory))


def size_of_shapes(manifest: Manifest, emulator: Emulator, shapes: ModelShapes) -> Size:
    """What the manifest says, or what follows from its share of bytes or its memory."""
    dtype = emulator.factor_dtype
    if emulator.ratio is not None:
        return Size(emulator.ratio, dtype)
    if emulator.memory is None:
        return Size(*within_bytes(emulator.share, dtype, shapes.value_bytes))
    dtypes: tuple[FactorDtype, ...] = get_args(FactorDtype) if dtype is None else (dtype,)
    found = {each: _ratios(manifest, shapes, emulator.memory, each) for each in dtypes}
    chosen = dtype or best_of({each: _common(ratios) for each, ratios in found.items()})
    ratio = _common(found[chosen])
    if ratio is None:
        task = next(name for name, largest in found[chosen].items() if largest is None)
        smallest = best_ratio(shapes, setting_of(manifest, task), emulator.memory, chosen)
        if smallest.memory.peak <= USABLE_SHARE * emulator.memory:
            limit = limit_of(shapes, smallest, emulator.memory)
            raise InputError(
                f"{manifest.path}: emulator.memory: too little for {limit}; lower stream.batch_size, "
                "emulator.refine.batch_size or max_length of calibration and tasks, or leave the refinement out"
            )
        raise InputError(
            f"{manifest.path}: emulator.memory: tasks.{task} cannot be trained in it with any emulator; lower its "
            "max_length or per_device_train_batch_size, or compress its activations"
        )
    return Size(ratio, dtype or kind_of(chosen))


def _ratios(manifest: Manifest, shapes: ModelShapes, memory_bytes: int, dtype: FactorDtype) -> dict[str, float | None]:
    """The largest ratio with which each task can be trained."""
    settings = {name: setting_of(manifest, name) for name in _planned_tasks(manifest)}
    return {name: best_ratio(shapes, setting, memory_bytes, dtype).ratio for name, setting in settings.items()}


def _common(ratios: Mapping[str, float | None]) -> float | None:
    """The largest with which all can be trained."""
    known = [ratio for ratio in ratios.values() if ratio is not None]
    return min(known) if len(known) == len(ratios) else None


class Costs:
    """What the steps of one manifest cost. A model that is not here, or has no linears, leaves all unknown.

    Raises `InputError` where nothing fits the manifest's memory.
    """

    def __init__(self, manifest: Manifest, directory: Path | None) -> None:
        self._manifest = manifest
        self._shapes: ModelShapes | None = None
        self.size: Size | None = None
        if directory is None:
            return
        try:
            self._shapes = shapes_from_headers(directory)
        except InputError:  # the step itself will say what is wrong
            return
        if manifest.emulator is not None:
            self.size = size_of_shapes(manifest, manifest.emulator, self._shapes)

    def of(self, kind: str, task: str | None, ratio: float | None, direct: bool) -> StepCosts:
        """The costs of a step; `ratio` is its own where it slices or trains on a slice."""
        shapes = self._shapes
        if shapes is None:
            return StepCosts()
        whole = self.size or Size(1.0, None)
        ratio, dtype = ratio or whole.ratio, whole.factor_dtype or "bf16"
        model = shapes.parameters * shapes.value_bytes
        emulator = model if direct or self.size is None else emulator_bytes(shapes, ratio, dtype)
        if kind == "compile":
            assert self._manifest.emulator is not None
            tokens = self._manifest.stream.batch_size * self._manifest.emulator.calibration.max_length
            widest = widest_ratio(ratio, self._manifest.emulator.allocation)
            return StepCosts(read_bytes=model, write_bytes=emulator, peak_bytes=compile_bytes(shapes, widest, tokens))
        if kind == "refine":
            section = self._manifest.emulator
            assert section is not None
            refinement = section.refinement
            assert refinement is not None
            tokens = refinement.batch_size * section.calibration.max_length
            peak = refine_bytes(shapes, ratio, tokens, section.allocation)
            return StepCosts(read_bytes=model + emulator, write_bytes=emulator, peak_bytes=peak)
        if kind == "slice":
            return StepCosts(read_bytes=emulator_bytes(shapes, whole.ratio, dtype), write_bytes=emulator)
        if task is None:
            return StepCosts()
        setting = setting_of(self._manifest, task)
        adapter = MASTER_BYTES * lora_parameters(shapes, setting.lora_rank)
        largest = shapes.largest_block_bytes
        return {
            "train": StepCosts(
                read_bytes=emulator, write_bytes=adapter, peak_bytes=train_memory(shapes, emulator, setting).peak
            ),
            "correct": StepCosts(
                # Once, too, where held-out text chooses: the stream that scores also says what the solver needs.
                read_bytes=model + emulator,
                write_bytes=adapter,
                peak_bytes=pass_bytes(shapes, ratio, setting)["correct"],
            ),
            "merge": StepCosts(read_bytes=model + adapter, write_bytes=model),
            "evaluate": StepCosts(read_bytes=model, write_bytes=0, peak_bytes=largest),
            "polish": self._polish_costs(task, shapes, model, adapter),
        }.get(kind, StepCosts())

    def _polish_costs(self, task: str, shapes: ModelShapes, model_bytes: int, adapter_bytes: int) -> StepCosts:
        polishing, training = self._manifest.polishing(task), self._manifest.training(task)
        if polishing is None:
            return StepCosts()
        peak = polish_bytes(shapes, training.lora.r, polishing.micro_batch_size * training.max_length)
        return StepCosts(read_bytes=2 * polishing.steps * model_bytes, write_bytes=adapter_bytes, peak_bytes=peak)
