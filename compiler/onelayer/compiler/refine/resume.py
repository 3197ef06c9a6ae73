"""What survives a killed refinement: one file for each finished unit. At the end they become a whole emulator.

A unit's file holds its factors in the form in which they will be stored; its header holds the errors before and after.
The file exists only when it is complete, so a kill costs at most one unit.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
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

    Both are measured on the inputs that it learned from. So are the errors of the gradients at its inputs and at its
    linears' outputs, if these were learned too. `dropped_rows` counts rows of the original's outputs that were not
    finite; they are left out.
    """

    name: str
    before: float
    after: float
    dropped_rows: int
    gradients_before: float | None = None
    gradients_after: float | None = None


class RefineWork:
    """The finished units of the refinement of `emulator`, by position."""

    def __init__(self, path: Path, emulator: Emulator, original: Checkpoint) -> None:
        self.path, self.emulator, self.original = path, emulator, original
        self._finished: dict[int, tuple[RefinedUnit, dict[str, TensorInfo]]] = {}
        for file in sorted(path.glob(UNIT_PATTERN)):
            with suppress(InputError, KeyError, ValidationError):  # the unit is trained again
                self._read(int(file.stem.removeprefix("unit-")), file)

    @property
    def units(self) -> list[RefinedUnit]:
        """The figures of all finished units, in module order."""
        return [self._finished[position][0] for position in sorted(self._finished)]

    def _read(self, position: int, file: Path) -> None:
        table, metadata = read_header(file)
        self._finished[position] = RefinedUnit.model_validate_json(metadata["figures"]), table

    def take_up(self, unit: Unit) -> None:
        """Take up what this process or another one wrote of a unit."""
        self._read(unit.position, self._file(unit))

    def _file(self, unit: Unit) -> Path:
        return self.path / f"unit-{unit.position:05d}.safetensors"

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished."""
        return unit.position in self._finished

    def finish(self, unit: Unit, tensors: Mapping[str, torch.Tensor], figures: RefinedUnit) -> None:
        """Write a unit's factors by their names in the emulator, with its figures."""
        entries = [tensor_entry(name, tensor) for name, tensor in tensors.items()]
        self._check_unchanged()
        write_safetensors(self._file(unit), entries, {"figures": figures.model_dump_json()})

    @property
    def refined(self) -> Emulator:
        """The emulator with the factors of finished units in place of its own."""
        replaced = {name: info for _, table in self._finished.values() for name, info in table.items()}
        checkpoint = self.emulator.checkpoint
        return replace(self.emulator, checkpoint=replace(checkpoint, tensors={**checkpoint.tensors, **replaced}))

    def publish(self, output: Path, record: Mapping[str, Any], meter: Meter) -> None:
        """Write the emulator with the finished units' factors in place of its own, under a new digest.

        Its record has the errors of the units. The errors of single linears and of coded stacks no longer hold and
        are removed.
        """
        emulator = self.emulator
        refined = self.refined.checkpoint.tensors
        by_file = {
            file: [
                copy_entry(name, refined[name])
                for name, info in emulator.checkpoint.tensors.items()
                if info.file == file
            ]
            for file in emulator.checkpoint.files
        }
        with atomic_directory(output) as partial:
            copy_beside_weights(emulator.directory, partial)
            write_shards(partial, emulator, by_file, meter, "write")
            document = read_json(emulator.directory / FIGURES_FILE)
            for kind in ("linears", "stacks"):
                document[kind] = [
                    _without_errors(row) if kind == "linears" or row.get("form") == "coded" else row
                    for row in document.get(kind, [])
                ]
            refined_facts = {"digest": model_digest(partial), "refined": {"emulator": emulator.digest, **record}}
            write_json(partial / FIGURES_FILE, {**document, **refined_facts})
            write_text(partial / "README.md", card(document["base"]["model"], refined=True))
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        self.emulator.checkpoint.check_unchanged()
        self.original.check_unchanged()


def _without_errors(row: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in row.items() if field not in ERROR_FIELDS}
