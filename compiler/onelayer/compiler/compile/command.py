"""The compile pass: the original streams by once, and its emulator is written unit by unit.

In: a checkpoint and a data set. Out: an emulator directory. Held on the device: one unit, the moments of its linears,
one micro-batch. Read: every tensor once, embeddings by rows.
"""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from onelayer.compiler.codes.forms import CodeShape
from onelayer.compiler.compile.coded import CodedCompilation
from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.compile.outcome import CompileResult, compile_result, remarks, spectrum_ranks, tell_unvisited
from onelayer.compiler.compile.resume import WorkDirectory
from onelayer.compiler.compile.selection import (
    Choice,
    Ranks,
    backward_workspace,
    choose_codes,
    choose_ranks,
    choose_stack_codes,
    choose_stacks,
    coded_workspace,
    compile_workspace,
    emulator_bytes,
)
from onelayer.compiler.compile.settings import CompileKeywords, CompileSettings, ResolvedSettings
from onelayer.compiler.compile.writer import EmulatorWriter
from onelayer.compiler.data.classes import is_trainable
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.emulators.slice import slice_to_ranks
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.quantize import check_library
from onelayer.compiler.factors.ranks import copies_on_disk, widest_ratio
from onelayer.compiler.machine.console import StopRequest, notice
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import model_digest, resolve_model
from onelayer.compiler.storage.companions import check_companions
from onelayer.compiler.storage.files import check_disk, check_output
from onelayer.compiler.streaming.calibration import Calibration, read_calibration
from onelayer.compiler.streaming.denoising_loss import PassBatch
from onelayer.compiler.streaming.spill import SpillPool


@settings_keywords(CompileSettings, CompileKeywords)
def compile_emulator(
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    **settings: Unpack[CompileKeywords],
) -> CompileResult:
    """Compile the emulator of a model that keeps a part of each linear in its repeated layers.

    There are two ways to choose how much: `keep_bytes`, the share of the linear's bytes at 16 bits (0.25 if neither is
    given), or `ratio`, the share of its values whatever their dtype. `factor_dtype` ("bf16", "int8", "nf4") is how
    factors are stored; a linear whose factors would not be smaller is quantized whole. None means the original's dtype
    with `ratio`, and the best dtype for a share of bytes (`best_factor_dtype`). `rank_allocation` is "uniform", as in
    the paper and the default with `ratio`, or "spectrum", the default with a share of bytes: the same bytes are spent
    where the spectra ask for them. The experts of a mixture always have uniform ranks.
    `form` "coded" replaces a linear by codes with a thin low-rank part instead, for a share of bytes alone, and "auto"
    chooses the better form for that share. With `backward`, the default with codes, a pass back over the calibration
    data weighs errors by what the loss feels; experts are weighted by their inputs alone.
    `samples` examples of at most `max_length` tokens are drawn from `calibration`.
    Parked states beyond `host_memory_bytes` go to disk. An interrupted compile goes on where it stopped. Raises
    `InputError` for what the caller can fix; `output` exists only once the whole emulator does.
    """
    asked, output = CompileSettings.of(settings), Path(output)
    check_output(output, model)
    streamed = StreamedModel(resolve_model(model, asked.revision))
    if not (streamed.library.DENOISES or is_trainable(type(streamed.model))):
        notice(
            f"{model}: {type(streamed.model).__name__} is no language model and no sequence classifier, so "
            "onelayer train will refuse its emulator; train with PEFT yourself, or polish the original"
        )
    check_companions(streamed.checkpoint.directory)
    resolved, ranks, code = _chosen(streamed, asked)
    is_quantized = resolved.factor_dtype is not None
    check_library(resolved.factor_dtype)
    chosen = Choice(ranks, choose_stacks(streamed, resolved.ratio, quantized=is_quantized), code)
    if code is not None and (coded := choose_stack_codes(streamed, chosen.stacks, resolved.share)) is not None:
        stack_code, stacks = coded
        chosen = Choice(ranks, stacks, code, stack_code)
    copies = copies_on_disk(resolved.rank_allocation, quantized=is_quantized)
    stored = emulator_bytes(streamed, ranks, chosen.stacks, resolved.factor_dtype, code, chosen.stack_code)
    check_disk(output, copies * stored)
    # A relative path would be taken for a Hub id from another working directory.
    name = str(Path(model).absolute()) if Path(model).exists() else str(model)
    base = {"model": name, "revision": asked.revision, "digest": model_digest(streamed.checkpoint.directory)}
    return _compile(streamed, chosen, calibration, output, base, resolved)


def _chosen(streamed: StreamedModel, asked: CompileSettings) -> tuple[ResolvedSettings, Ranks, CodeShape | None]:
    """Resolve the settings for a model, choose a rank for each of its linears, and their codes, if they are coded.

    Raises `InputError` if codes are asked for and its linears are too small for them.
    """
    resolved = asked.resolved(streamed.dtype.itemsize, is_bfloat16=streamed.dtype == torch.bfloat16)
    widest, is_quantized = widest_ratio(resolved.ratio, resolved.rank_allocation), resolved.factor_dtype is not None
    ranks = choose_ranks(streamed, widest, quantized=is_quantized)
    if resolved.form != "coded":
        return resolved, ranks, None
    if (coded := choose_codes(streamed, ranks, resolved.share)) is not None:
        code, coded_ranks = coded
        return resolved, coded_ranks, code
    if asked.form == "coded":
        raise InputError(
            f"--form coded: the linears of {streamed.checkpoint.directory} are too small for codes within --keep-bytes "
            f"{resolved.share:g}; give --form factors"
        )
    return _chosen(streamed, asked.model_copy(update={"form": "factors"}))


def _compile(
    streamed: StreamedModel,
    chosen: Choice,
    calibration: DataSource,
    output: Path,
    base: Mapping[str, Any],
    settings: ResolvedSettings,
) -> CompileResult:
    """Stream the original, write its emulator unit by unit, publish it whole."""
    device = pick_device(settings.device)
    data = read_calibration(streamed, calibration, settings, backward=settings.backward is True)
    if settings.backward and not data.backward:
        settings = settings.model_copy(update={"backward": False})
    # On a card, what waits for the way back lies on the host. A host that is the device itself would hold more and more
    # of it with every unit, so there it lies in files, unless memory is given for it.
    keeps = settings.backward and device.type == "cpu"
    spill_pool = SpillPool(0 if keeps and settings.host_memory_bytes is None else settings.host_memory_bytes)
    facts = _facts(settings, data, device)
    # Another version may choose other codes for the same settings: its units are not taken up.
    codes = {} if chosen.code is None else {"codes": [chosen.code, chosen.stack_code]}
    with (
        StopRequest() as stop,
        WorkDirectory.open(output, {"base": base, **facts, **codes}, settings.resume) as work,
        Meter(device) as meter,
    ):
        writer = EmulatorWriter(work, streamed, settings.factor_dtype)
        kind = Compilation if settings.form == "factors" else CodedCompilation
        job = kind(streamed, chosen, writer, device, settings, stop, spill_pool)
        job.stream(data.batches, meter)
        return processes().by_first(lambda: _finished(job, meter, data.batches, base, facts, output))


def _finished(
    job: Compilation,
    meter: Meter,
    batches: Sequence[PassBatch],
    base: Mapping[str, Any],
    facts: Mapping[str, Any],
    output: Path,
) -> CompileResult:
    """Write what no unit of the stream wrote, and publish the emulator."""
    streamed, settings, writer = job.streamed, job.settings, job.writer
    writer.write_rest()
    keeps_whole = settings.factor_dtype is not None and settings.rank_allocation == "spectrum"
    workspace = compile_workspace(
        streamed, job.ranks, job.stack_ranks, job.loads, settings.factor_dtype, keeps_whole, meter.on_gpu
    )
    if settings.form == "coded":
        backward = settings.backward is True
        workspace = coded_workspace(streamed, job.chosen, job.loads, meter.on_gpu, backward=backward, inputs=job.inputs)
    elif settings.backward:
        workspace += backward_workspace(streamed, job.ranks, job.loads, meter.on_gpu)
    workspace += job.spill_pool.budget_bytes if settings.backward and not meter.on_gpu else 0
    workspace += streamed.host_bytes(meter.on_gpu)
    report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
    result = compile_result(writer, settings, output, report)
    figures = result.model_dump(mode="json", exclude={"output", "linears", "stacks", *settings.recorded()})
    remarked = remarks(writer, [*job.ranks, *job.stack_ranks], job.revisited)
    tell_unvisited(remarked["dense"])
    writer.finish(base, {**facts, **remarked, **figures})
    if settings.rank_allocation == "uniform":
        writer.work.publish(output)
        return result
    sliced = slice_to_ranks(writer.work.payload, spectrum_ranks(writer, settings), output, {"ratio": settings.ratio})
    changed = ("parameters_after", "layer_parameters_after", "kept_bytes_share", "linears", "stacks")
    return result.model_copy(update={name: getattr(sliced, name) for name in changed})


def _facts(settings: ResolvedSettings, data: Calibration, device: torch.device) -> dict[str, Any]:
    """What decides the emulator's bytes apart from the model; a run can go on only if all of it is the same."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "calibration": {"digest": data.digest, "samples": data.samples, "tokens": data.positions},
        "settings": {**settings.recorded(), "device": device.type},
        "versions": {**versions, "transformers": transformers.__version__},
    }
