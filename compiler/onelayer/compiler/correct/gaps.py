"""Reads the weights and factors for a correction from disk; yields the gap of every compressed linear, one by one.

A few linears are processed at once, each in its own thread, which alternates between reading rows and multiplying them.
While one thread reads, another computes. So the pass takes as long as reading takes, or as its products take on all
cores.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock

import torch

from onelayer.compiler.adapters.fit import is_transposed
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.correct.correction import Gap, measure_gap
from onelayer.compiler.correct.memory import CHUNK_BYTES, LINEARS_AT_ONCE, CorrectedShape, correction_bytes
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.threads import read_ahead
from onelayer.compiler.models.streamed_model import StreamedModel

# Weights that transformers' conversion rules assemble are made one at a time: that code is not made for threads.
_CONVERTING = Lock()

Read = Callable[[], torch.Tensor]


def measure_gaps(
    streamed: StreamedModel, emulator: Emulator, adapter: Adapter, names: Sequence[str], meter: Meter
) -> Iterator[tuple[str, Gap]]:
    """Yield the gaps of the compressed linears `names`, in the order in which their weights lie on disk."""

    def location(name: str) -> tuple[Path, int]:
        info = streamed.checkpoint.tensors[streamed.weights.checkpoint_keys[f"{name}.weight"][0]]
        return info.file, info.start

    def work(name: str) -> Gap:
        rows = (read() for read in _weight_reads(streamed, name))
        transposed = is_transposed(streamed.model.get_submodule(name))
        gap = linear_gap(adapter, name, rows, emulator.factors(name), transposed)
        return checked(name, gap.there(gap.error))

    ordered = sorted(names, key=location)
    with Progress(len(ordered), "correct") as progress:
        for count, gap in enumerate(
            read_ahead((partial(work, name) for name in ordered), LINEARS_AT_ONCE, LINEARS_AT_ONCE)
        ):
            progress.reached(count, ordered[count], meter.sample())
            yield ordered[count], gap


def linear_gap(
    adapter: Adapter,
    name: str,
    rows: Iterator[torch.Tensor],
    factors: tuple[torch.Tensor, torch.Tensor | None],
    transposed: bool,
) -> Gap:
    """Compute the gap of one linear of `adapter`, as `measure_gap` does."""
    return measure_gap(rows, *factors, *adapter.factors(name), adapter.modules[name].scaling, transposed)


def checked(name: str, gap: Gap) -> Gap:
    """Return the gap of a linear. Raises `InputError` with its name if a value is not finite."""
    if not gap.error.isfinite().all():
        raise InputError(f"{name}: weight or emulator holds values that are not finite; check the original's files")
    return gap


def _weight_reads(streamed: StreamedModel, name: str) -> list[Read]:
    """List reads of consecutive rows of one weight; one read of all rows if it is stored in another form."""
    parameter = f"{name}.weight"
    empty = streamed.weights.bare_parameters[parameter]
    if not streamed.weights.reads_rows(parameter):
        return [partial(_converted, streamed, parameter)]
    (key,) = streamed.weights.checkpoint_keys[parameter]
    rows, width = empty.shape
    step = max(1, CHUNK_BYTES // (width * empty.element_size()))

    def read(start: int) -> torch.Tensor:
        return streamed.checkpoint.read_rows(key, start, min(start + step, rows)).to(empty.dtype)

    return [partial(read, start) for start in range(0, rows, step)]


def _converted(streamed: StreamedModel, parameter: str) -> torch.Tensor:
    with _CONVERTING:
        (tensor,) = streamed.weights.load([parameter]).values()
    return tensor


def correct_workspace(streamed: StreamedModel, emulator: Emulator, adapter: Adapter) -> int:
    """Predict the bytes that a correction holds, from shapes alone (`correction_bytes`)."""

    def shape(name: str) -> CorrectedShape:
        module, weight = adapter.modules[name], streamed.weights.bare_parameters[f"{name}.weight"]
        return CorrectedShape(
            module.out_features,
            module.in_features,
            emulator.facts.compressed[name],
            module.rank,
            weight.numel() * weight.element_size(),
            streamed.weights.reads_rows(f"{name}.weight"),
        )

    return correction_bytes([shape(name) for name in adapter.modules if name in emulator.facts.compressed])
