"""The directory in which a merge grows, shard by shard, so that one that was stopped goes on where it was.

Beside the output lies `.NAME.merge` with the shards finished so far and a record of what is merged into what. It
becomes the output in one rename.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onelayer.compiler.errors import InputError
from onelayer.compiler.files import check_output, publish_directory, read_json, write_json

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
            _begin(work, record)
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


def _begin(work: Path, record: Mapping[str, Any]) -> None:
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
