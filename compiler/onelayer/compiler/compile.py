"""The compile pass: the original streams by once, an emulator of it is written behind it.

In: a checkpoint and a data set. Out: an emulator directory. Held on the device: one unit, the moments of its linears,
one micro-batch. Read: every tensor once, embeddings by rows.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from onelayer.compiler.calibration import DataSource, make_batches, read_tokens, tokens_digest
from onelayer.compiler.checkpoint import model_digest, resolve_model
from onelayer.compiler.compile_job import Allocation, Compilation, CompileResult, Settings
from onelayer.compiler.compression import check_disk, choose_ranks, workspace_bytes
from onelayer.compiler.emulator import EmulatorWriter
from onelayer.compiler.factorize import Solver
from onelayer.compiler.files import check_output
from onelayer.compiler.measure import Meter
from onelayer.compiler.parking import Parking
from onelayer.compiler.slice import cut_emulator
from onelayer.compiler.stream import Stream, pick_device
from onelayer.compiler.tokens import Tokens, load_tokenizer
from onelayer.compiler.units import StreamedModel
from onelayer.compiler.workdir import StopRequest, WorkDirectory


def compile_emulator(
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    *,
    ratio: float = 0.25,
    samples: int = 64,
    max_length: int = 512,
    batch_size: int = 1,
    rank_allocation: Allocation = "uniform",
    solver: Solver = "exact",
    device: str | None = None,
    host_memory_bytes: int | None = None,
    seed: int = 0,
    resume: bool = True,
    revision: str | None = None,
) -> CompileResult:
    """Compile the emulator of a model that keeps `ratio` of the weights of each linear in its repeated layers.

    `samples` examples of at most `max_length` tokens are drawn from `calibration`. `rank_allocation="spectrum"` spends
    the same number of weights where the spectra ask for them. Parked states beyond `host_memory_bytes` go to disk. An
    interrupted compile is taken up where it stopped. Raises `InputError` for what the caller can mend; `output` exists
    only once the whole emulator does.
    """
    settings = Settings(ratio, samples, max_length, batch_size, rank_allocation, solver, seed)
    output = Path(output)
    check_output(output)
    place = pick_device(device)
    parking = Parking(host_memory_bytes)
    directory = resolve_model(model, revision)
    streamed = StreamedModel(directory)
    ranks = choose_ranks(streamed, settings.widest_ratio)
    check_disk(output, streamed, ranks, copies=1 if rank_allocation == "uniform" else 2)
    tokens = read_tokens(calibration, load_tokenizer(directory), max_length, samples, seed)
    batches = make_batches(tokens, streamed.config, batch_size)
    # A relative path would be taken for a Hub id from another working directory.
    name = str(Path(model).absolute()) if Path(model).exists() else str(model)
    base = {"model": name, "revision": revision, "digest": model_digest(directory)}
    facts = _facts(settings, tokens, place)
    with (
        WorkDirectory.open(output, {"base": base, **facts}, resume) as work,
        Meter(place) as meter,
        StopRequest() as stop,
    ):
        job = Compilation(streamed, ranks, EmulatorWriter(work, streamed), place, settings, stop)
        job.stream(batches, Stream(streamed, place, meter, around=job.around, parking=parking, description="compile"))
        job.writer.write_rest()
        workspace = workspace_bytes(streamed, ranks, max(batch.targets.numel() for batch in batches))
        result = job.result(
            output, meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
        )
        figures = result.model_dump(mode="json", exclude={"output", "linears"})
        job.writer.finish(base, {**facts, **job.remarks(), **figures})
        if rank_allocation == "uniform":
            work.publish(output)
            return result
        cut = cut_emulator(work.payload, job.spectrum_ranks(), output, {"ratio": ratio})
        work.discard()
    after = {name: getattr(cut, name) for name in ("parameters_after", "layer_parameters_after", "linears")}
    return result.model_copy(update=after)


def _facts(settings: Settings, tokens: Sequence[Tokens], place: torch.device) -> dict[str, Any]:
    """What, beside the model, decides the emulator's bytes; a run can be taken up only where all of it is the same."""
    counted = sum(len(item.input_ids) for item in tokens)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "calibration": {"digest": tokens_digest(tokens), "samples": len(tokens), "tokens": counted},
        "settings": {**vars(settings), "device": place.type},
        "versions": {**versions, "transformers": transformers.__version__},
    }
