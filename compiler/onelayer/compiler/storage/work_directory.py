"""The directory in which an output grows: what a killed run finished in it is taken up by the next.

Next to the output lies `.NAME.KIND`, locked while a process works in it, with a record of what the work was begun with.
Work that was begun with the same goes on; other work is refused or discarded, as its kind says. The output appears in
one rename, when it is complete.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.storage.files import check_output, publish_directory, read_json, write_json


@dataclass(frozen=True)
class WorkKind:
    """One kind of work: its files, and what becomes of an interrupted piece of it.

    `finished` is the pattern of files that are worth keeping; a directory without any holds no work and blocks nothing.
    `record` is the file that says what the work was begun with. Work that was begun with something else is refused
    with the message `refused`, and work that nobody asked to resume with `unasked`; without a message it is discarded.
    Messages may name `{path}`, `{record}`, the differing `{fields}` and their `{changes}`. `busy` says what another
    process does that holds the lock.
    """

    name: str
    finished: str
    record: str = "identity.json"
    refused: str | None = "{path}: begun with other input ({changes}); give --no-resume to start over"
    unasked: str | None = None
    busy: str = "is at work on it now"

    def path(self, output: Path) -> Path:
        """Return the directory in which `output` grows."""
        return output.absolute().with_name(f".{output.absolute().name}.{self.name}")

    def any_finished(self, path: Path) -> bool:
        """Whether the work in `path` is worth keeping."""
        return any(path.glob(self.finished))


@contextmanager
def work_directory(output: Path, kind: WorkKind, identity: Mapping[str, Any], resume: bool = True) -> Iterator[Path]:
    """Yield the locked directory in which `output` grows: taken up if it was begun with `identity`, or new.

    It is removed at the end; after an error it stays if anything in it is finished. Of several processes of a run the
    first holds it for all. Raises `InputError` if `output` cannot be written, another run holds the lock, or the kind
    of work refuses what is there.
    """
    team = processes()
    with ExitStack() as held:
        yield team.by_first(lambda: held.enter_context(_locked_directory(output, kind, identity, resume)))
        team.wait()  # others may still write into it


@contextmanager
def _locked_directory(output: Path, kind: WorkKind, identity: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    from filelock import FileLock, Timeout

    check_output(output)
    path = kind.path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0)
    try:
        with lock:
            check_output(output)  # another process may have finished it since
            begin(path, kind, identity, resume)
            try:
                yield path
                shutil.rmtree(path, ignore_errors=True)
            finally:
                if not kind.any_finished(path):
                    shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):  # while the lock is held: another process may wait for this very file
                    Path(lock.lock_file).unlink()
    except Timeout:
        raise InputError(f"{output}: another process {kind.busy}; wait for it or choose another --output") from None


def begin(path: Path, kind: WorkKind, identity: Mapping[str, Any], resume: bool) -> None:
    """Make `path` an empty directory with a record of `identity`, or leave it as an interrupted run with that did.

    The caller holds the lock. Raises `InputError` if the kind of work refuses what is there.
    """
    as_recorded = json.loads(json.dumps(dict(identity)))
    if _goes_on(path, kind, as_recorded, resume):
        return
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error.strerror}); choose another --output") from None
    write_json(path / kind.record, as_recorded)


def publish_work(path: Path, kind: WorkKind, output: Path) -> None:
    """Make a work directory that holds nothing but the output and its record the output, in one step."""
    (path / kind.record).unlink()
    publish_directory(path, output)


def _goes_on(path: Path, kind: WorkKind, identity: Mapping[str, Any], resume: bool) -> bool:
    """Whether `path` holds work that was begun with `identity`."""
    record = path / kind.record
    if not record.is_file() or not kind.any_finished(path):
        return False
    if not resume:
        if kind.unasked is not None:
            raise InputError(kind.unasked.format(path=path, record=record))
        return False
    differing = _differing(record, kind, identity)
    if differing and kind.refused is not None:
        values = {name: f"{name} was {before!r} and is {now!r}" for name, (before, now) in differing.items()}
        changes, fields = ", ".join(values[name] for name in sorted(values)), ", ".join(differing)
        raise InputError(kind.refused.format(path=path, record=record, fields=fields, changes=changes))
    return not differing


def _differing(record: Path, kind: WorkKind, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that the recorded work has otherwise, with their values then and now."""
    try:
        begun = read_json(record)
    except InputError:
        if kind.refused is not None:
            raise
        begun = None
    if not isinstance(begun, dict):  # a damaged record: the work is of no use
        begun = {}
    names = {**identity, **begun}
    return {name: (begun.get(name), identity.get(name)) for name in names if begun.get(name) != identity.get(name)}
