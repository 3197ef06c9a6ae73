"""The directory in which a compile grows: one durable file per finished unit, so that a kill costs at most one unit.

Beside the output lies `.NAME.compile`: in `payload/` the shards of finished units, beside it a record for each (written
after its shard) and `identity.json`, which says what the run was begun with. The payload becomes the output in one
rename, or is taken up again.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from onelayer.compiler.checkpoint import read_header
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import check_output, publish_directory, read_json, write_json

IDENTITY_FILE = "identity.json"
RECORD_PATTERN = "unit-*.json"


class UnitRecord(BaseModel):
    """What a finished unit left: its shard, the bytes of each tensor in it, and figures for the final report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: int
    shard: str
    tensor_bytes: dict[str, int]
    linears: list[dict[str, Any]]
    stacks: list[dict[str, Any]] = []
    dense: dict[str, str]


class WorkDirectory:
    """A compile in progress. `finished` are the records of units that need not be done again, by position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.payload = path / "payload"
        self.finished: dict[int, UnitRecord] = {}

    @classmethod
    @contextmanager
    def open(cls, output: Path, identity: Mapping[str, Any], resume: bool) -> Iterator["WorkDirectory"]:
        """Begin or take up the work for `output`; on an error it is kept if any unit is finished.

        Raises `InputError` where the work was begun with something else, naming the fields, or is being done by
        another process.
        """
        with claimed(output, "compile", identity, resume, finished=RECORD_PATTERN) as path:
            work = cls(path)
            work.payload.mkdir(exist_ok=True)
            work._read_records()
            yield work

    def _read_records(self) -> None:
        """Take up the units whose record and shard are whole; anything else is done again."""
        for file in sorted(self.path.glob(RECORD_PATTERN)):
            try:
                record = UnitRecord.model_validate(read_json(file))
                table, _ = read_header(self.payload / record.shard) if record.shard else ({}, {})
            except (InputError, ValidationError):
                continue
            if {name: info.size_bytes for name, info in table.items()} == record.tensor_bytes:
                self.finished[record.position] = record

    def finish_unit(self, record: UnitRecord) -> None:
        """Record a unit whose shard is on the disk."""
        write_json(self.path / f"unit-{record.position:05d}.json", record.model_dump(mode="json"))
        self.finished[record.position] = record

    def discard(self) -> None:
        """Remove the work, once what it led to is safe elsewhere."""
        shutil.rmtree(self.path)

    def publish(self, output: Path) -> None:
        """Make the finished payload the output, in one step; only then forget the records."""
        publish_directory(self.payload, output)
        self.discard()


@contextmanager
def claimed(output: Path, kind: str, identity: Mapping[str, Any], resume: bool, *, finished: str) -> Iterator[Path]:
    """The directory `.NAME.kind` in which `output` grows, locked: taken up where it was begun with `identity`, or new.

    A directory without a file of the pattern `finished` holds no work, whatever was begun: it stands in nobody's way.
    Raises `InputError` where it was begun with something else, naming the fields, or another process holds it.
    """
    check_output(output)
    path = output.absolute().with_name(f".{output.absolute().name}.{kind}")
    lock = FileLock(path.with_suffix(f".{kind}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            _begin(path, identity, resume and any(path.glob(finished)))
            try:
                yield path
            finally:
                if not any(path.glob(finished)):
                    shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):  # while it is held: another process may wait for this very file
                    Path(lock.lock_file).unlink()
    except Timeout:
        raise InputError(
            f"{output}: another process is at work on it now; wait for it or choose another --output"
        ) from None


def _begin(path: Path, identity: Mapping[str, Any], resume: bool) -> None:
    if resume and (path / IDENTITY_FILE).is_file():
        _check_identity(path, identity)
        return
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error.strerror}); choose another --output") from None
    write_json(path / IDENTITY_FILE, dict(identity))


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    begun = read_json(path / IDENTITY_FILE)
    differing = [name for name in {**begun, **identity} if begun.get(name) != identity.get(name)]
    if differing:
        told = ", ".join(f"{name} was {begun.get(name)!r} and is {identity.get(name)!r}" for name in sorted(differing))
        raise InputError(f"{path}: begun with other input ({told}); give --no-resume to start anew")


class StopRequest:
    """Turns SIGINT and SIGTERM into a stop at the next unit boundary; a second signal stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\nstopping when this unit is finished; interrupt again to stop now\n")

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if a stop was asked for."""
        if self._asked:
            raise KeyboardInterrupt
