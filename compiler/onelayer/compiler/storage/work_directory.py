"""The directory in which a compile grows: one durable file per finished unit, so that a kill costs at most one unit.

Beside the output lies `.NAME.compile`: in `payload/` the shards of finished units, beside it a record for each (written
after its shard) and `identity.json`, which says what the run was begun with. The payload becomes the output in one
rename, or is taken up again.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import check_output, publish_directory, read_json, write_json

IDENTITY_FILE = "identity.json"


@contextmanager
def work_directory(
    output: Path, kind: str, identity: Mapping[str, Any], resume: bool, *, finished: str
) -> Iterator[Path]:
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


RECORD_FILE = ".merge.json"


@contextmanager
def merge_directory(output: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Begin the work for `output`, or take up what was begun with the same `record`; publish it at the end.

    On an error it is kept if any shard is finished. Work on anything else than `record` is thrown away. Raises
    `InputError` where `output` holds files, cannot be written, or is being written by another process.
    """
    check_output(output)
    work = output.absolute().with_name(f".{output.absolute().name}.merge")
    lock = FileLock(work.with_suffix(".merge.lock"), timeout=0)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            _begin_merge(work, record)
            try:
                yield work
                (work / RECORD_FILE).unlink()
                publish_directory(work, output)
            except BaseException:
                if not any(work.glob("[!.]*.safetensors")):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            finally:
                with suppress(OSError):  # by its owner alone, while it is held
                    Path(lock.lock_file).unlink()
    except Timeout:
        raise InputError(
            f"{output}: another process is merging it now; wait for it, or choose another --output"
        ) from None


def _begin_merge(work: Path, record: Mapping[str, Any]) -> None:
    """An empty directory with the record, or what is there of the same."""
    with suppress(InputError):  # no record, or a damaged one: the work is of no use
        if read_json(work / RECORD_FILE) == dict(record):
            return
    with suppress(FileNotFoundError):
        shutil.rmtree(work)
    try:
        work.mkdir()
    except OSError as error:
        raise InputError(f"{work.parent}: cannot be written ({error.strerror}); choose another --output") from None
    write_json(work / RECORD_FILE, dict(record))
