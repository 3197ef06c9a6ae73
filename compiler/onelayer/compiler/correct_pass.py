"""The correction's reading: weights and factors from disk in, the gap of every compressed linear out, one at a time.

Rows are read ahead in a thread while the rows before them are multiplied, so the pass takes as long as reading does.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from onelayer.compiler.adapter import Adapter
from onelayer.compiler.adapter_fit import is_transposed
from onelayer.compiler.correction import BLOCK_BYTES, Gap, measure_gap
from onelayer.compiler.emulator_reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.measure import Meter, Progress
from onelayer.compiler.prefetch import ahead
from onelayer.compiler.units import StreamedModel

# Weights are read by rows, in pieces of about this size.
CHUNK_BYTES = 8 << 20
READ_AHEAD = 2  # chunks

Job = Callable[[], tuple[torch.Tensor, ...]]


def read_gaps(
    streamed: StreamedModel, small: Emulator, source: Adapter, names: Sequence[str], meter: Meter
) -> Iterator[tuple[str, Gap]]:
    """The gaps of the linears `names`, all of them compressed, in the order in which their weights lie on the disk."""

    def place(name: str) -> tuple[Path, int]:
        info = streamed.checkpoint.tensors[streamed.keys[f"{name}.weight"][0]]
        return info.file, info.start

    ordered = sorted(names, key=place)
    chunks = {name: _weight_jobs(streamed, name) for name in ordered}

    def jobs() -> Iterator[Job]:
        for name in ordered:
            yield partial(small.factors, name)
            yield from chunks[name]

    results = ahead(jobs(), READ_AHEAD)
    with Progress(len(ordered), "correct") as progress:
        for count, name in enumerate(ordered):
            progress.reached(count, name, meter.sample())
            up, down = next(results)
            rows = (chunk for (chunk,) in islice(results, len(chunks[name])))
            transposed = is_transposed(streamed.model.get_submodule(name))
            yield name, gap_of(source, name, rows, (up, down), transposed)
        assert next(results, None) is None, "every chunk that was read belongs to a linear"


def gap_of(
    source: Adapter,
    name: str,
    rows: Iterator[torch.Tensor],
    factors: tuple[torch.Tensor, torch.Tensor],
    transposed: bool,
) -> Gap:
    """The gap of one linear of `source`. Raises `InputError` by name where a value is not finite."""
    gap = measure_gap(rows, *factors, *source.factors(name), source.modules[name].scaling, transposed)
    if not gap.error.isfinite().all():
        raise InputError(f"{name}: weight or emulator holds values that are not finite; check the original's files")
    return gap


def _weight_jobs(streamed: StreamedModel, name: str) -> list[Job]:
    """Reads of consecutive rows of one weight; of the whole where the checkpoint holds it in another form."""
    parameter = f"{name}.weight"
    empty = streamed.bare_parameter(parameter)
    if parameter not in streamed.plain:
        return [lambda: tuple(streamed.convert([parameter], streamed.read([parameter])).values())]
    (key,) = streamed.keys[parameter]
    rows, width = empty.shape
    step = max(1, CHUNK_BYTES // (width * empty.element_size()))

    def read(start: int) -> tuple[torch.Tensor, ...]:
        return (streamed.checkpoint.read_rows(key, start, min(start + step, rows)).to(empty.dtype),)

    return [partial(read, start) for start in range(0, rows, step)]


def workspace_bytes(streamed: StreamedModel, small: Emulator, source: Adapter) -> int:
    """What the largest linear costs at most: its factors in their dtype and in float32, the chunks of its weight (all
    of it, twice, where the checkpoint holds it in another form), one block, and six (out, r) in float64."""

    def cost(name: str) -> int:
        module, rank = source.modules[name], small.facts.ranks[name]
        weight = streamed.bare_parameter(f"{name}.weight")
        weight_bytes = weight.numel() * weight.element_size()
        is_plain = f"{name}.weight" in streamed.plain
        chunks = min((READ_AHEAD + 2) * CHUNK_BYTES, weight_bytes) if is_plain else 2 * weight_bytes
        sides = module.in_features + module.out_features
        return chunks + BLOCK_BYTES + 8 * (rank + 6 * module.rank) * sides

    return max((cost(name) for name in source.modules if name in small.facts.ranks), default=0)
