"""Refine: the factors of an emulator trained, unit by unit, against the original as it streams by.

In: an emulator, its original, calibration data. Out: an emulator of the same ranks and bytes whose units give what the
original's give. Held on the device: one unit of the original, its factors with their optimizer, the graph of one batch.
"""

import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from onelayer.compiler.data.batches import make_batches, tokens_digest
from onelayer.compiler.data.labeled_rows import DataSource, read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.quantize import check_library
from onelayer.compiler.machine.console import StopRequest, capped
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.refine.job import RefinePass, refine_workspace
from onelayer.compiler.refine.resume import REFINE_WORK, RefinedUnit, RefineWork
from onelayer.compiler.refine.settings import RefineSettings
from onelayer.compiler.results import Report, Result
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import check_disk, check_output
from onelayer.compiler.storage.work_directory import work_directory
from onelayer.compiler.streaming.spill import SpillPool


class RefineResult(Result):
    """What refine made: every unit's relative output error on the calibration data before and after."""

    output: str
    steps: int
    units: list[RefinedUnit]
    report: Report


def refine_emulator(
    emulator: str | Path,
    *,
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    steps: int = 100,
    step_samples: int = 8,
    learning_rate: float = 0.01,
    samples: int = 256,
    max_length: int = 512,
    batch_size: int = 1,
    device: str | None = None,
    host_memory_bytes: int | None = None,
    seed: int = 0,
    resume: bool = True,
) -> RefineResult:
    """Write the emulator whose factors were trained, a unit at a time, to give what the units of `model` give.

    Ranks, dtype and bytes stay the same. Each unit is trained by `steps` steps, each on `step_samples` of the `samples`
    examples or all there are, `batch_size` at once, with the original's own inputs; `learning_rate` is relative to the
    size of each factor. Factors are in no order afterwards, so the result cannot be sliced. Experts of mixtures stay as
    they are. An interrupted run is taken up behind its last finished unit. Raises `InputError` for what the caller can
    mend.
    """
    output, pace = Path(output), RefineSettings(steps, step_samples, learning_rate, seed)
    check_output(output)
    source = Emulator.open(emulator)
    check_library(source.facts.packed)
    directory = resolve_model(model, source.facts.base_revision)
    source.check_original(directory)
    check_disk(output, 2 * sum(info.size_bytes for info in source.checkpoint.tensors.values()))
    place, spill_pool = pick_device(device), SpillPool(host_memory_bytes)
    streamed = StreamedModel(directory)
    tokens = read_tokens(calibration, load_tokenizer(directory), max_length, samples, seed)
    pace = replace(pace, step_samples=capped("--step-samples", step_samples, len(tokens)))
    batches = make_batches(tokens, streamed.config, batch_size)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {**vars(pace), "samples": samples, "max_length": max_length, "batch_size": batch_size}
    facts: dict[str, Any] = {
        "calibration": {"digest": tokens_digest(tokens), "samples": len(tokens)},
        "settings": {**settings, "device": place.type},
        "versions": {**versions, "transformers": transformers.__version__},
    }
    identity = {"emulator": source.digest, **facts}
    with (
        StopRequest() as stop,
        work_directory(output, REFINE_WORK, identity, resume) as path,
        Meter(place) as meter,
    ):
        work = RefineWork(path, source)
        RefinePass(streamed, source, work, pace, meter, spill_pool).refine(batches, stop)
        at_once = max(math.prod(batch.shape) for batch in batches)
        workspace = refine_workspace(streamed, source, at_once, meter.on_gpu)
        report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
        result = RefineResult(output=str(output), steps=steps, units=work.units, report=report)
        work.publish(output, {**facts, **result.model_dump(mode="json", include={"units", "report"})}, meter)
    return result
