"""What survives a killed refinement: a file for each finished unit, in the end a whole emulator of them.

A unit's file holds its factors as they will be stored and, in its header, what they gained; it exists only when it is
complete, so a kill costs at most one unit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from onelayer.compiler.emulators.directory import card, copy_beside_weights
from onelayer.compiler.emulators.figures import ERROR_FIELDS
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.shards import write_shards
from onelayer.compiler.emulators.slice import FIGURES_FILE
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.units import Unit
from onelayer.compiler.results import Result
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import atomic_directory, read_json, write_json, write_text
from onelayer.compiler.storage.safetensors_format import TensorInfo, read_header
from onelayer.compiler.storage.safetensors_writer import copy_entry, tensor_entry, write_safetensors
from onelayer.compiler.storage.work_directory import WorkKind

UNIT_PATTERN = "unit-*.safetensors"
REFINE_WORK = WorkKind("refine", finished=UNIT_PATTERN)


class RefinedUnit(Result):
    """The relative error ||outputs - the original's|| / ||the original's|| of a unit, before and after.

    Both are for the original's inputs. `dropped_rows` of the original's outputs were not finite and are left out.
    """

    name: str
    before: float
    after: float
    dropped_rows: int


class RefineWork:
    """The finished part of the refinement of `source`, by the position of each unit."""

    def __init__(self, path: Path, source: Emulator, original: Checkpoint) -> None:
        self.path, self.source, self.original = path, source, original
        self._finished: dict[int, tuple[RefinedUnit, dict[str, TensorInfo]]] = {}
        for file in sorted(path.glob(UNIT_PATTERN)):
            try:
                table, metadata = read_header(file)
                figures = RefinedUnit.model_validate_json(metadata["figures"])
            except (InputError, KeyError, ValidationError):
                continue  # it is made again
            self._finished[int(file.stem.removeprefix("unit-"))] = figures, table

    @property
    def units(self) -> list[RefinedUnit]:
        """The figures of all finished units, in module order."""
        return [self._finished[position][0] for position in sorted(self._finished)]

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished."""
        return unit.position in self._finished

    def finish(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor], before: float, after: float, dropped_rows: int
    ) -> None:
        """Write a unit's factors by their names in the emulator."""
        figures = RefinedUnit(name=unit.name, before=before, after=after, dropped_rows=dropped_rows)
        file = self.path / f"unit-{unit.position:05d}.safetensors"
        entries = [tensor_entry(name, tensor) for name, tensor in tensors.items()]
        self._check_unchanged()
        write_safetensors(file, entries, {"figures": figures.model_dump_json()})
        self._finished[unit.position] = figures, read_header(file)[0]

    def publish(self, output: Path, record: Mapping[str, Any], meter: Meter) -> None:
        """Write the emulator with the finished units' factors in place of its own, under a new digest.

        Its records say how far the units are from the original; the errors of the linears no longer hold and go.
        """
        source = self.source
        refined = {name: info for _, table in self._finished.values() for name, info in table.items()}
        by_file = {
            file: [
                copy_entry(name, refined.get(name, info))
                for name, info in source.checkpoint.tensors.items()
                if info.file == file
            ]
            for file in source.checkpoint.files
        }
        with atomic_directory(output) as partial:
            copy_beside_weights(source.directory, partial)
            write_shards(partial, source, by_file, meter, "write")
            document = read_json(source.directory / FIGURES_FILE)
            document["linears"] = [
                {field: value for field, value in row.items() if field not in ERROR_FIELDS}
                for row in document["linears"]
            ]
            refined_facts = {"digest": model_digest(partial), "refined": {"emulator": source.digest, **record}}
            write_json(partial / FIGURES_FILE, {**document, **refined_facts})
            write_text(partial / "README.md", card(document["base"]["model"], refined=True))
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        self.source.checkpoint.check_unchanged()
        self.original.check_unchanged()
