"""Writes the shards of an emulator that is made from another one: a slice, or an emulator with trained factors."""

from collections.abc import Mapping
from pathlib import Path

from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.storage.safetensors_writer import Entry, write_index, write_safetensors


def write_shards(
    target: Path, source: Emulator, by_file: Mapping[Path, list[Entry]], meter: Meter, description: str
) -> list[int]:
    """Write the shards that replace those of `source`, then the index; return the bytes of each shard."""
    checkpoint = source.checkpoint
    with Progress(len(by_file), description) as progress:
        for count, (file, entries) in enumerate(by_file.items()):
            progress.reached(count, file.name, meter.sample())
            write_safetensors(target / file.name, entries, checkpoint.metadata[file])
    sizes = [sum(entry.size_bytes for entry in entries) for entries in by_file.values()]
    if checkpoint.index_file is not None:
        weight_map = {entry.name: file.name for file, entries in by_file.items() for entry in entries}
        write_index(target / checkpoint.index_file.name, weight_map, sum(sizes))
    return sizes
