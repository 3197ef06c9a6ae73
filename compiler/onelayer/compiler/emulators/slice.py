"""An emulator in, a smaller one out, without the original: factors are ordered by energy, so a slice is their prefix.

Quantized factors are sliced by rows, so nothing is quantized again. Held: one factor at a time. Letters: k rank,
out / in features.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from onelayer.compiler.documents import checked_document
from onelayer.compiler.emulators.directory import copy_beside_weights
from onelayer.compiler.emulators.facts import DENSE, DOWN, UP
from onelayer.compiler.emulators.figures import (
    FIGURE_DIGITS,
    LinearFigures,
    LinearSummary,
    StackFigures,
    StackSummary,
    kept_bytes_share,
)
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.shards import write_shards
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.results import Report, Result, round_significant
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.companions import check_companions
from onelayer.compiler.storage.files import atomic_directory, check_output, read_json, write_json
from onelayer.compiler.storage.model_config import read_model_config, write_model_config
from onelayer.compiler.storage.safetensors_writer import Entry, copy_entry, tensor_entry

FIGURES_FILE = "emulator.json"


class _Settings(BaseModel):
    ratio: float


class _Figures(BaseModel):
    """The fields of `emulator.json` that a slice needs."""

    settings: _Settings
    parameters_before: int
    parameters_after: int
    layer_parameters_after: int
    linears: list[LinearFigures]
    stacks: list[StackFigures] = []

    @property
    def compressed(self) -> list[LinearFigures]:
        """Linears and stacks."""
        return [*self.linears, *self.stacks]


class SliceResult(Result):
    """The result of a slice. `parameters_before` are the original's; errors follow from the emulator's records.

    `requantised` says whether stored codes had to change. No dtype requires that: every row has its own scales.
    """

    output: str
    parameters_before: int
    parameters_after: int
    layer_parameters_after: int
    kept_bytes_share: float
    requantised: Literal[False] = False
    linears: list[LinearSummary]
    stacks: list[StackSummary]
    report: Report


def slice_emulator(emulator: str | Path, ratio: float, output: str | Path) -> SliceResult:
    """Write the emulator that keeps `ratio` of each linear's weights, sliced from one that keeps more.

    Dense weights of the larger emulator, quantized or not, stay dense: they have no factors to slice. Raises
    `InputError` if `ratio` is larger than the emulator's own, or if dense weights would leave the slice much larger
    than requested.
    """
    if not 0 < ratio < 1:
        raise InputError(f"--ratio {ratio}: must lie between 0 and 1, for example 0.25")
    check_output(Path(output), emulator)
    source = Emulator.open(emulator)
    if source.facts.codes or any(stack.code_width is not None for stack in source.facts.stacks.values()):
        raise InputError(f"{source.directory}: holds codes, which cannot be sliced; compile a smaller emulator")
    figures, _ = _read_figures(source)
    if ratio > (stored := figures.settings.ratio):
        raise InputError(f"--ratio {ratio}: {source.directory} keeps only {stored}; compile a larger emulator")
    factored = [item for item in figures.compressed if item.form == "factors"]
    if not factored:
        raise InputError(f"{source.directory}: holds whole weights, which cannot be sliced; compile a smaller emulator")
    ranks = {item.name: rank_for(ratio, *_shape(item, source)[-2:]) or item.rank for item in factored}
    _check_worth(source, figures, ratio, ranks)
    return slice_to_ranks(emulator, ranks, output, {"ratio": ratio})


def _check_worth(source: Emulator, figures: _Figures, ratio: float, ranks: Mapping[str, int]) -> None:
    """Refuse a slice that would remove less than half of what it should."""
    everything = sum(math.prod(_shape(item, source)) for item in figures.compressed)
    before, after = (
        sum(_weights(item, source) for item in items) / everything
        for items in (figures.compressed, [_sliced_figures(item, ranks, source) for item in figures.compressed])
    )
    if before - after < (before - ratio) / 2:
        whole = sum(item.form == "dense" for item in figures.compressed)
        raise InputError(
            f"--ratio {ratio}: {source.directory} holds {whole} of {len(figures.compressed)} linears whole, which "
            f"cannot be sliced, so {after:.2f} of their values would stay; compile a smaller emulator"
        )


def slice_to_ranks(
    emulator: str | Path, ranks: Mapping[str, int | None], output: str | Path, settings: Mapping[str, Any]
) -> SliceResult:
    """Write the emulator with shorter factors: at most `ranks` directions of each linear or stack of experts.

    `settings` are recorded. A rank of None keeps the quantized weight, which the emulator holds next to the factors.
    """
    output = Path(output)
    check_output(output, emulator)
    source = Emulator.open(emulator)
    check_companions(source.directory)
    figures, document = _read_figures(source)
    sliced = [_sliced_figures(item, ranks, source) for item in figures.compressed]
    removed = sum(
        _weights(before, source) - _weights(after, source)
        for before, after in zip(figures.compressed, sliced, strict=True)
    )
    stacks = [item for item in sliced if isinstance(item, StackFigures)]
    linears = [item for item in sliced if not isinstance(item, StackFigures)]
    with atomic_directory(output) as partial, Meter(torch.device("cpu")) as meter:
        copy_beside_weights(source.directory, partial)
        by_file = _plan_shards(source, sliced)
        shard_sizes = write_shards(partial, source, by_file, meter, "slice")
        _write_config(partial, source, sliced)
        largest = max(info.size_bytes for info in source.checkpoint.tensors.values())
        report = meter.report(max(shard_sizes), 2 * largest, source.checkpoint.bytes_read)
        result = SliceResult(
            output=str(output),
            parameters_before=figures.parameters_before,
            parameters_after=figures.parameters_after - removed,
            layer_parameters_after=figures.layer_parameters_after - removed,
            kept_bytes_share=kept_bytes_share(
                {entry.name: entry.size_bytes for entries in by_file.values() for entry in entries},
                {item.name: source.shape(item.name) for item in linears},
                {item.name: item.shape for item in stacks},
            ),
            linears=[item.summary for item in linears],
            stacks=[item.stack_summary for item in stacks],
            report=report,
        )
        record = {
            **document,
            "digest": model_digest(partial),
            "settings": {**document["settings"], **settings},
            "sliced_from": {"digest": source.digest, "ratio": figures.settings.ratio},
            **result.model_dump(mode="json", exclude={"output", "linears", "stacks", "report", "requantised"}),
            "report": document["report"],
            "linears": [item.model_dump(mode="json") for item in linears],
            "stacks": [item.model_dump(mode="json") for item in stacks],
        }
        source.checkpoint.check_unchanged()
        write_json(partial / FIGURES_FILE, record)
    return result


def _read_figures(source: Emulator) -> tuple[_Figures, dict[str, Any]]:
    """Read `emulator.json`, which has the singular values; return it checked, and the whole document."""
    path = source.directory / FIGURES_FILE
    document = read_json(path)
    if isinstance(document, dict) and "refined" in document:
        raise InputError(
            f"{source.directory}: its factors were refined and are in no order any more; slice the emulator that they "
            "were refined from"
        )
    figures = checked_document(_Figures, document, path, "compile the emulator again")
    stacks = {name: facts.full_rank for name, facts in source.facts.stacks.items()}
    recorded = {item.name: item.rank for item in figures.compressed}
    if recorded != {**source.facts.compressed, **stacks}:
        raise InputError(f"{path}: fields linears and stacks: do not agree with config.json; compile it again")
    return figures, document


def _shape(item: LinearFigures, source: Emulator) -> tuple[int, ...]:
    """Return (out, in) of a linear, (E, out, in) of a stack."""
    return item.shape if isinstance(item, StackFigures) else source.shape(item.name)


def _sliced_figures(item: LinearFigures, ranks: Mapping[str, int | None], source: Emulator) -> LinearFigures:
    """Compute the figures of a prefix: its relative error is sqrt(1 - kept energy / output energy) for any data.

    A stack that `ranks` does not name keeps its own rank.
    """
    if item.form == "dense":
        return item
    rank = ranks.get(item.name, item.rank) if isinstance(item, StackFigures) else ranks[item.name]
    if rank is None:
        return item.as_dense(source.shape(item.name))
    if rank >= item.rank:
        return item.model_copy(update={"dense_error": None})
    kept = item.singular_values[:rank]
    lost = 1 - sum(value * value for value in kept) / item.output_energy if item.output_energy else 0.0
    optimal = round_significant(math.sqrt(max(0.0, lost)), FIGURE_DIGITS)
    figures: dict[str, Any] = {"rank": rank, "error": optimal, "optimal_error": optimal, "unquantised_error": None}
    if item.prefix_errors is not None:
        figures |= {"error": item.prefix_errors[rank - 1], "unquantised_error": optimal}
        figures |= {"prefix_errors": item.prefix_errors[:rank], "dense_error": None}
    if isinstance(item, StackFigures):
        figures["largest_error"] = None
    return item.model_copy(update={**figures, "singular_values": kept})


def _weights(item: LinearFigures, source: Emulator) -> int:
    *count, out_features, in_features = _shape(item, source)
    one = out_features * in_features if item.form == "dense" else item.rank * (out_features + in_features)
    return math.prod(count) * one


def _plan_shards(source: Emulator, sliced: Sequence[LinearFigures]) -> dict[Path, list[Entry]]:
    """Plan the same shards with shorter factors."""
    checkpoint, items = source.checkpoint, {item.name: item for item in sliced}
    owners = {name + ending: (name, ending) for name in items for ending in (UP, DOWN, DENSE)}
    owners |= source.stack_tensors
    by_file: dict[Path, list[Entry]] = {file: [] for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        owner, ending = owners.get(name, (None, None))
        item = None if owner is None else items[owner]
        if item is None:
            by_file[info.file].append(copy_entry(name, info))
        elif (ending == DENSE) == (item.form == "dense"):
            rows_first = source.facts.quantized_dtype is not None or ending == DOWN
            by_file[info.file].append(_prefix(source, name, item, rows_first))
    return by_file


def _prefix(source: Emulator, name: str, item: LinearFigures, rows_first: bool) -> Entry:
    """Plan a whole weight unchanged, or the first `rank` rows of a factor: columns of a plain up (out, k).

    A stack of factors (E, ...) keeps those of each expert.
    """
    checkpoint, info, rank = source.checkpoint, source.checkpoint.tensors[name], item.rank
    if item.form == "dense":
        return copy_entry(name, info)
    *count, rows, columns = info.shape
    shape = (*count, rank, columns) if rows_first else (*count, rows, rank)

    def chunks() -> Iterator[bytes | memoryview]:
        if rows_first and not count:
            factor = checkpoint.read_rows(name, 0, rank)
        else:
            whole = checkpoint.read(name)
            factor = whole[..., :rank, :] if rows_first else whole[..., :rank]
        yield from tensor_entry(name, factor).chunks()

    return Entry(name, info.dtype, shape, chunks)


def _write_config(target: Path, source: Emulator, sliced: Sequence[LinearFigures]) -> None:
    document = read_model_config(target)
    section = document["quantization_config"]
    linears = [item for item in sliced if not isinstance(item, StackFigures)]
    section["ranks"] = {item.name: item.rank for item in linears if item.form == "factors"}
    if source.facts.quantized_dtype is not None:
        section["quantized_dense"] = [item.name for item in linears if item.form == "dense"]
    for item in sliced:
        if isinstance(item, StackFigures) and item.form == "factors":
            section["stacks"][item.name]["rank"] = item.rank
    write_model_config(target, document)
