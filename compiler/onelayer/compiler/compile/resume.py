"""What survives a killed compile: one record for each finished unit.

In the work directory `payload/` holds the shards of finished units; the record of a unit is written after its shard.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.storage.digests import sha256_file
from onelayer.compiler.storage.files import publish_directory, read_json, write_json
from onelayer.compiler.storage.safetensors_format import read_header
from onelayer.compiler.storage.work_directory import WorkKind, work_directory

RECORD_PATTERN = "unit-*.json"
COMPILE_WORK = WorkKind("compile", finished=RECORD_PATTERN)


class UnitRecord(BaseModel):
    """A finished unit: its shard with its SHA-256, the bytes of each tensor in it, and figures for the final report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: int
    shard: str
    sha256: str | None = None
    tensor_bytes: dict[str, int]
    linears: list[dict[str, Any]]
    stacks: list[dict[str, Any]] = []
    dense: dict[str, str]


class WorkDirectory:
    """A compile in progress. `finished` holds the records of units that need not be done again, by position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.payload = path / "payload"
        self.finished: dict[int, UnitRecord] = {}

    @classmethod
    @contextmanager
    def open(cls, output: Path, identity: Mapping[str, Any], resume: bool) -> Iterator["WorkDirectory"]:
        """Begin or take up the work for `output`; see `work_directory`."""
        with work_directory(output, COMPILE_WORK, identity, resume) as path:
            work = cls(path)
            # Read by one of several processes for all: it may publish the payload while others would still read it.
            work.finished = processes().by_first(work._read_records)
            yield work

    def _read_records(self) -> dict[int, UnitRecord]:
        """Return the units whose record and shard are whole; anything else is done again."""
        self.payload.mkdir(exist_ok=True)
        finished = {}
        for file in sorted(self.path.glob(RECORD_PATTERN)):
            try:
                record = UnitRecord.model_validate(read_json(file))
                table, _ = read_header(self.payload / record.shard) if record.shard else ({}, {})
            except (InputError, ValidationError):
                continue
            whole = not record.shard or sha256_file(self.payload / record.shard) == record.sha256
            if whole and {name: info.size_bytes for name, info in table.items()} == record.tensor_bytes:
                finished[record.position] = record
        return finished

    def finish_unit(self, record: UnitRecord) -> None:
        """Record a unit whose shard is on the disk."""
        write_json(self.path / f"unit-{record.position:05d}.json", record.model_dump(mode="json"))
        self.finished[record.position] = record

    def publish(self, output: Path) -> None:
        """Make the finished payload the output, in one step."""
        publish_directory(self.payload, output)
