"""An emulator in, a smaller one out, without the original: factors are ordered by energy, so a prefix is the smaller.

Held: one factor at a time. Letters: k rank, out / in features.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from onelayer.compiler.checkpoint import model_digest
from onelayer.compiler.companions import copy_companions
from onelayer.compiler.emulator import LinearFigures, LinearSummary
from onelayer.compiler.emulator_reader import DOWN, UP, Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import atomic_directory, check_output, read_json, write_json
from onelayer.compiler.measure import Meter, Progress, Report, Result
from onelayer.compiler.ranks import rank_for
from onelayer.compiler.writer import Entry, copy_entry, tensor_entry, write_index, write_safetensors

FIGURES_FILE = "emulator.json"


class _Settings(BaseModel):
    ratio: float


class _Figures(BaseModel):
    """What a slice needs of `emulator.json`."""

    settings: _Settings
    parameters_before: int
    parameters_after: int
    layer_parameters_after: int
    linears: list[LinearFigures]


class SliceResult(Result):
    """What `slice_emulator` made. `parameters_before` are the original's; errors follow from the singular values."""

    output: str
    parameters_before: int
    parameters_after: int
    layer_parameters_after: int
    linears: list[LinearSummary]
    report: Report


def slice_emulator(emulator: str | Path, ratio: float, output: str | Path) -> SliceResult:
    """Write the emulator that keeps `ratio` of each linear's weights, cut from one that keeps more.

    Linears that the larger emulator holds dense stay dense: there is nothing to cut. Raises `InputError` where `ratio`
    is larger than the emulator's own.
    """
    if not 0 < ratio < 1:
        raise InputError(f"--ratio {ratio}: must lie between 0 and 1, for example 0.25")
    source = Emulator.open(emulator)
    figures, _ = _read_figures(source)
    if ratio > (stored := figures.settings.ratio):
        raise InputError(f"--ratio {ratio}: {source.directory} keeps only {stored}; compile a larger emulator")
    ranks = {item.name: rank_for(ratio, *source.shape(item.name)) or item.rank for item in figures.linears}
    return cut_emulator(emulator, ranks, output, {"ratio": ratio})


def cut_emulator(
    emulator: str | Path, ranks: Mapping[str, int], output: str | Path, settings: Mapping[str, Any]
) -> SliceResult:
    """Write the emulator with shorter factors: at most `ranks` directions of each linear; `settings` are recorded."""
    output = Path(output)
    check_output(output)
    source = Emulator.open(emulator)
    figures, document = _read_figures(source)
    sliced = [_cut_figures(item, ranks[item.name]) for item in figures.linears]
    kept = {item.name: item.rank for item in sliced}
    removed = sum((item.rank - kept[item.name]) * sum(source.shape(item.name)) for item in figures.linears)
    with atomic_directory(output) as partial, Meter(torch.device("cpu")) as meter:
        copy_companions(source.directory, partial)
        shard_sizes = _write_shards(partial, source, kept, meter)
        _write_config(partial, source, kept)
        largest = max(info.size_bytes for info in source.checkpoint.tensors.values())
        report = meter.report(max(shard_sizes), 2 * largest, source.checkpoint.bytes_read)
        result = SliceResult(
            output=str(output),
            parameters_before=figures.parameters_before,
            parameters_after=figures.parameters_after - removed,
            layer_parameters_after=figures.layer_parameters_after - removed,
            linears=[item.summary for item in sliced],
            report=report,
        )
        record = {
            **document,
            "digest": model_digest(partial),
            "settings": {**document["settings"], **settings},
            "sliced_from": {"digest": source.digest, "ratio": figures.settings.ratio},
            **result.model_dump(mode="json", exclude={"output", "linears", "report"}),
            "report": document["report"],
            "linears": [item.model_dump(mode="json") for item in sliced],
        }
        write_json(partial / FIGURES_FILE, record)
    return result


def _read_figures(source: Emulator) -> tuple[_Figures, dict[str, Any]]:
    """`emulator.json`, checked, and as it stands; without it the singular values are unknown."""
    path = source.directory / FIGURES_FILE
    document = read_json(path)
    try:
        figures = _Figures.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: field {field}: {first['msg']}; compile the emulator again") from None
    if {item.name: item.rank for item in figures.linears} != source.facts.ranks:
        raise InputError(f"{path}: field linears: does not agree with the ranks of config.json; compile it again")
    return figures, document


def _cut_figures(item: LinearFigures, rank: int) -> LinearFigures:
    """The figures of a prefix: its relative error is sqrt(1 - kept energy / output energy), whatever the data."""
    if rank >= item.rank:
        return item
    kept = item.singular_values[:rank]
    lost = 1 - sum(value * value for value in kept) / item.output_energy if item.output_energy else 0.0
    error = float(f"{math.sqrt(max(0.0, lost)):.6g}")
    return item.model_copy(update={"rank": rank, "error": error, "optimal_error": error, "singular_values": kept})


def _write_shards(target: Path, source: Emulator, ranks: dict[str, int], meter: Meter) -> list[int]:
    """The same shards with shorter factors, then the index; returns the bytes of each shard."""
    checkpoint = source.checkpoint
    by_file: dict[Path, list[Entry]] = {file: [] for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        by_file[info.file].append(_entry(source, name, ranks))
    with Progress(len(by_file), "slice") as progress:
        for count, (file, entries) in enumerate(by_file.items()):
            progress.reached(count, file.name, meter.sample())
            write_safetensors(target / file.name, entries, checkpoint.metadata[file])
    sizes = [sum(entry.size_bytes for entry in entries) for entries in by_file.values()]
    if checkpoint.index_file is not None:
        weight_map = {entry.name: file.name for file, entries in by_file.items() for entry in entries}
        write_index(target / checkpoint.index_file.name, weight_map, sum(sizes))
    return sizes


def _entry(source: Emulator, name: str, ranks: dict[str, int]) -> Entry:
    """A tensor as it stands, or the first columns of an up (out, k), or the first rows of a down (k, in)."""
    checkpoint, info = source.checkpoint, source.checkpoint.tensors[name]
    module, _, leaf = name.rpartition(".")
    if f".{leaf}" not in (UP, DOWN) or module not in ranks:
        return copy_entry(name, info)
    rank = ranks[module]
    shape = (info.shape[0], rank) if f".{leaf}" == UP else (rank, info.shape[1])

    def chunks() -> Iterator[bytes | memoryview]:
        factor = checkpoint.read(name)[:, :rank] if f".{leaf}" == UP else checkpoint.read_rows(name, 0, rank)
        yield from tensor_entry(name, factor).chunks()

    return Entry(name, info.dtype, shape, chunks)


def _write_config(target: Path, source: Emulator, ranks: dict[str, int]) -> None:
    document: dict[str, Any] = read_json(source.directory / "config.json")
    document["quantization_config"]["ranks"] = ranks
    write_json(target / "config.json", document)
