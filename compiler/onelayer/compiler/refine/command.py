"""The refine pass: trains the factors of an emulator, unit by unit, against the original as it streams by.

In: an emulator, its original, calibration data. Out: an emulator of the same ranks and bytes whose units reproduce the
original's outputs. Held on the device: one unit of the original, its factors with their optimizer, the graph of one
batch.
"""

import platform
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.quantize import check_library
from onelayer.compiler.machine.console import StopRequest, capped, notice
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.refine.job import GradientRefinePass, RefinePass, UnitTraining, refine_workspace
from onelayer.compiler.refine.own_inputs import OwnInputsPass
from onelayer.compiler.refine.resume import REFINE_WORK, RefinedUnit, RefineWork
from onelayer.compiler.refine.settings import RefineKeywords, RefineSettings, ResolvedRefineSettings
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.companions import check_companions
from onelayer.compiler.storage.files import check_disk, check_output
from onelayer.compiler.storage.work_directory import work_directory
from onelayer.compiler.streaming.calibration import Calibration, read_calibration
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.unit_loads import UnitLoads


class RefineResult(Result):
    """The result of a refinement: every unit's relative output error on the calibration data before and after."""

    output: str
    steps: int
    units: list[RefinedUnit]
    report: Report


@settings_keywords(RefineSettings, RefineKeywords)
def refine_emulator(
    emulator: str | Path,
    *,
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    **settings: Unpack[RefineKeywords],
) -> RefineResult:
    """Train an emulator's factors, a unit at a time, to reproduce the outputs of `model`; write the result.

    Ranks, dtype and bytes stay the same. Each unit is trained for `steps` steps. `inputs` says on which inputs: the
    "original"'s, or those that the units of the "emulator" refined so far have made, the default for codes. A step
    uses `step_samples` of the `samples` examples, or all if there are fewer, and computes `batch_size` at once.
    `learning_rate` is relative to the size of each factor. Training leaves the factors in no order, so the result
    cannot be sliced. Experts of mixtures are trained if they are codes. With `backward`, a pass goes on to the loss
    and back, and each unit also learns the gradients at its inputs and at its linears' outputs; a model without a loss
    has none, and an emulator is used for its gradients. An interrupted run continues after its last finished unit.
    Raises `InputError` for bad input.
    """
    chosen, output = RefineSettings.of(settings), Path(output)
    check_output(output, emulator, model)
    opened = Emulator.open(emulator)
    check_companions(opened.directory)
    check_library(opened.facts.quantized_dtype)
    directory = resolve_model(model, opened.facts.base_revision)
    streamed = StreamedModel(directory)
    opened.check_original(directory)
    if stacks := [stack for stack in opened.facts.stacks.values() if stack.code_width is None]:
        notice(f"{opened.directory}: {len(stacks)} stacks of experts stay as they are, since they are not codes")
    check_disk(output, 2 * sum(info.size_bytes for info in opened.checkpoint.tensors.values()))
    data = read_calibration(streamed, calibration, chosen, backward=chosen.backward)
    if data.backward and not processes().is_alone:
        raise InputError("--backward: is the work of one process; start it without torchrun, or give --no-backward")
    step_samples = capped("--step-samples", chosen.step_samples, data.samples)
    chosen = chosen.model_copy(update={"step_samples": step_samples, "backward": data.backward})
    return _refine(streamed, opened, data, output, chosen.resolved(coded=bool(opened.facts.codes)))


def _refine(
    streamed: StreamedModel, emulator: Emulator, data: Calibration, output: Path, settings: ResolvedRefineSettings
) -> RefineResult:
    """Stream the original, train the emulator unit by unit, publish it whole."""
    device = pick_device(settings.device)
    # What waits for the way back grows with every unit, and twins double what waits. On a host that is the device
    # itself it lies in files.
    waits = settings.backward or settings.inputs == "emulator"
    keeps = waits and device.type == "cpu" and settings.host_memory_bytes is None
    spill_pool = SpillPool(0 if keeps else settings.host_memory_bytes)
    batches = data.batches
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts: dict[str, Any] = {
        "calibration": {"digest": data.digest, "samples": data.samples},
        "settings": {**settings.recorded(), "device": device.type},
        "versions": {**versions, "transformers": transformers.__version__},
    }
    identity = {"emulator": emulator.digest, **facts}
    with (
        StopRequest() as stop,
        work_directory(output, REFINE_WORK, identity, settings.resume) as path,
        Meter(device) as meter,
    ):
        work = RefineWork(path, emulator, streamed.checkpoint)
        loads = UnitLoads()
        training = UnitTraining(streamed, emulator, work, settings, meter, stop, loads)
        if settings.backward:
            GradientRefinePass(training, batches, spill_pool).refine()
        else:
            kind = OwnInputsPass if settings.inputs == "emulator" else RefinePass
            kind(training, spill_pool).refine(batches)

        def publish() -> RefineResult:
            workspace = refine_workspace(streamed, emulator, loads, meter.on_gpu, backward=settings.backward)
            workspace += streamed.host_bytes(meter.on_gpu)
            report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
            result = RefineResult(output=str(output), steps=settings.steps, units=work.units, report=report)
            work.publish(output, {**facts, **result.model_dump(mode="json", include={"units", "report"})}, meter)
            return result

        return processes().by_first(publish)
