"""The compile pass: the original streams by once, an emulator of it is written behind it.

In: a checkpoint and a data set. Out: an emulator directory. Held on the device: one unit, the moments of its linears,
one micro-batch. Read: every tensor once, embeddings by rows.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.compile.outcome import CompileResult, compile_result, remarks, spectrum_ranks
from onelayer.compiler.compile.resume import WorkDirectory
from onelayer.compiler.compile.selection import Ranks, choose_ranks, choose_stacks, compile_workspace, emulator_bytes
from onelayer.compiler.compile.settings import CompileSettings
from onelayer.compiler.compile.writer import EmulatorWriter
from onelayer.compiler.data.batches import DataSource, make_batches, read_tokens, tokens_digest
from onelayer.compiler.data.tokens import Tokens, load_tokenizer
from onelayer.compiler.emulators.slice import cut_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.factorize import Solver
from onelayer.compiler.factors.quantize import check_library
from onelayer.compiler.factors.ranks import Allocation, copies_on_disk, widest_ratio
from onelayer.compiler.factors.stored_forms import DEFAULT_KEEP_BYTES, FactorDtype, checked_factor_dtype, within_bytes
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import model_digest, resolve_model
from onelayer.compiler.storage.files import check_disk, check_output
from onelayer.compiler.streaming.spill import SpillPool


def compile_emulator(
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    *,
    ratio: float | None = None,
    keep_bytes: float | None = None,
    factor_dtype: FactorDtype | None = None,
    samples: int = 64,
    max_length: int = 512,
    batch_size: int = 1,
    rank_allocation: Allocation | None = None,
    solver: Solver = "exact",
    device: str | None = None,
    host_memory_bytes: int | None = None,
    seed: int = 0,
    resume: bool = True,
    revision: str | None = None,
) -> CompileResult:
    """Compile the emulator of a model that keeps a part of each linear in its repeated layers.

    How much is said by `keep_bytes`, the share of the linear's bytes at 16 bits (0.25 if neither is given), or by
    `ratio`, the share of its values whatever their dtype. `factor_dtype` ("bf16", "int8", "nf4") is how factors are
    stored, where they would not be smaller a linear is then quantized whole; None is the original's dtype with `ratio`,
    and with a share of bytes the best for it (`best_kind`). `rank_allocation` is "uniform" as in the paper, the default
    with `ratio`, or "spectrum", the default with a share of bytes: the same bytes are spent where the spectra ask for
    them; the experts of a mixture have uniform ranks always.
    `samples` examples of at most `max_length` tokens are drawn from `calibration`.
    Parked states beyond `host_memory_bytes` go to disk. An interrupted compile is taken up where it stopped. Raises
    `InputError` for what the caller can mend; `output` exists only once the whole emulator does.
    """
    output = Path(output)
    check_output(output)
    kind = checked_factor_dtype(factor_dtype)
    _check_budget(ratio, keep_bytes)
    place = pick_device(device)
    spill_pool = SpillPool(host_memory_bytes)
    streamed = StreamedModel(resolve_model(model, revision))
    allocation: Allocation = rank_allocation or ("uniform" if ratio is not None else "spectrum")
    if ratio is None:
        ratio, kind = within_bytes(keep_bytes or DEFAULT_KEEP_BYTES, kind, streamed.dtype.itemsize)
    if kind == "bf16" and streamed.dtype == torch.bfloat16:
        kind = None  # what it stands for
    check_library(kind)
    settings = CompileSettings(ratio, kind, samples, max_length, batch_size, allocation, solver, seed)
    ranks = choose_ranks(streamed, widest_ratio(ratio, allocation), quantized=kind is not None)
    stacks = choose_stacks(streamed, ratio, quantized=kind is not None)
    copies = copies_on_disk(allocation, quantized=kind is not None)
    check_disk(output, copies * emulator_bytes(streamed, ranks, stacks, kind))
    # A relative path would be taken for a Hub id from another working directory.
    name = str(Path(model).absolute()) if Path(model).exists() else str(model)
    base = {"model": name, "revision": revision, "digest": model_digest(streamed.checkpoint.directory)}
    return _compile(streamed, ranks, stacks, calibration, output, base, settings, place, spill_pool, resume)


def _compile(
    streamed: StreamedModel,
    ranks: Ranks,
    stacks: Ranks,
    calibration: DataSource,
    output: Path,
    base: Mapping[str, Any],
    settings: CompileSettings,
    place: torch.device,
    spill_pool: SpillPool,
    resume: bool,
) -> CompileResult:
    """Stream the original, write the emulator behind it, publish it whole."""
    tokenizer = load_tokenizer(streamed.checkpoint.directory)
    tokens = read_tokens(calibration, tokenizer, settings.max_length, settings.samples, settings.seed)
    batches = make_batches(tokens, streamed.config, settings.batch_size)
    facts = _facts(settings, tokens, place)
    with (
        WorkDirectory.open(output, {"base": base, **facts}, resume) as work,
        Meter(place) as meter,
        StopRequest() as stop,
    ):
        writer = EmulatorWriter(work, streamed, settings.factor_dtype)
        job = Compilation(streamed, ranks, stacks, writer, place, settings, stop, spill_pool)
        job.stream(batches, meter)
        writer.write_rest()
        workspace = compile_workspace(streamed, ranks, stacks, max(math.prod(batch.shape) for batch in batches))
        report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
        result = compile_result(writer, settings, output, report)
        figures = result.model_dump(mode="json", exclude={"output", "linears", "stacks", *vars(settings)})
        writer.finish(base, {**facts, **remarks(writer, [*ranks, *stacks], job.revisited), **figures})
        if settings.rank_allocation == "uniform":
            work.publish(output)
            return result
        cut = cut_emulator(work.payload, spectrum_ranks(writer, settings), output, {"ratio": settings.ratio})
        work.discard()
    changed = ("parameters_after", "layer_parameters_after", "kept_bytes_share", "linears", "stacks")
    return result.model_copy(update={name: getattr(cut, name) for name in changed})


def _check_budget(ratio: float | None, keep_bytes: float | None) -> None:
    if ratio is not None and keep_bytes is not None:
        raise InputError("--ratio and --keep-bytes say the same in two ways; give one of them")
    if keep_bytes is not None and not 0 < keep_bytes < 1:
        raise InputError(f"--keep-bytes {keep_bytes}: must lie between 0 and 1, for example 0.15")


def _facts(settings: CompileSettings, tokens: Sequence[Tokens], place: torch.device) -> dict[str, Any]:
    """What, beside the model, decides the emulator's bytes; a run can be taken up only where all of it is the same."""
    counted = sum(len(item.input_ids) for item in tokens)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "calibration": {"digest": tokens_digest(tokens), "samples": len(tokens), "tokens": counted},
        "settings": {**vars(settings), "device": place.type},
        "versions": {**versions, "transformers": transformers.__version__},
    }
