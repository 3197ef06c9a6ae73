"""Files written so that a kill at any moment leaves either the old state or the new one, never half of either."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from stat import S_ISREG
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import GIB

# Reads, copies and hashes go through buffers of this size, so none of them grows with the file.
BUFFER_BYTES = 4 << 20
# The index of a million tensors has 100 MB; nothing that is read whole is larger.
DOCUMENT_LIMIT_BYTES = 256 << 20


def onelayer_home() -> Path:
    """Return the store: `$ONELAYER_HOME`, by default `~/.cache/onelayer`. Not created here."""
    return Path(os.environ.get("ONELAYER_HOME") or Path.home() / ".cache" / "onelayer").expanduser()


def sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that a later rename cannot overtake its contents."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, document: Any) -> None:
    """Write `document` as readable JSON, aside and renamed."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, aside and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def read_json(path: Path, finite: bool = True) -> Any:
    """Parse a JSON file; an `InputError` names the file, the line and the column of the fault.

    Numbers that are not finite are no JSON; `finite=False` takes them all the same.
    """
    remedy = "restore the file"
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise InputError(f"{path}: is not a regular file; {remedy}")
        if status.st_size > DOCUMENT_LIMIT_BYTES:
            limit_mib = DOCUMENT_LIMIT_BYTES >> 20
            raise InputError(f"{path}: {status.st_size} bytes, a document has at most {limit_mib} MiB; {remedy}")
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, deep nesting
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number")
    return value


# The longest ending that is added to an output's name while it is made: a work directory's lock, a process number.
_ADDED_NAME = len("..partial-4194304.lock")


def check_directory(directory: Path, remedy: str) -> None:
    """Raise `InputError` if something is no directory: absent, or a file in one."""
    if directory.is_file():
        raise InputError(f"{directory}: is a file, not a directory; {remedy}")
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; {remedy}")


def check_output(output: Path, *inputs: str | Path | None) -> None:
    """Refuse, before any work starts, an output directory that cannot be made.

    It must not exist with files in it, nor lie in one of `inputs`: paths that are read, or names that are no paths.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output}: exists and is not a directory; choose another --output")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: already holds files; remove it or choose another --output")
    _check_place(output)
    real = output.resolve()
    for source in inputs:
        if source is not None and Path(source).is_dir() and real.is_relative_to(Path(source).resolve()):
            raise InputError(f"{output}: lies in {source}, which is read; choose an --output outside of it")


def _check_place(output: Path) -> None:
    """Refuse an output that cannot appear by a rename in the directory above it."""
    if output.is_dir() and (Path.cwd().is_relative_to(output.resolve()) or os.path.ismount(output)):
        kind = "a mount point" if os.path.ismount(output) else "the working directory"
        raise InputError(f"{output}: is {kind}, which cannot be replaced; choose a new directory as --output")
    if output.absolute().name in ("", ".."):
        raise InputError(f"{output}: does not name a directory; choose another --output")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{output}: cannot be made, {parent} is not a directory; choose another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{output}: cannot be written, no permission in {parent}; choose another --output")
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(output.absolute().name)) + _ADDED_NAME > longest:
        raise InputError(f"{output}: has a name that is too long; choose another --output")


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Yield a directory next to `output`; on success it becomes `output`, on any error it is removed.

    Raises `InputError` if `output` already holds files or cannot be written.
    """
    check_output(output)
    partial = output.absolute().with_name(f".{output.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=False)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    try:
        yield partial
        publish_directory(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish_directory(partial: Path, output: Path) -> None:
    """Flush every file below `partial` and rename it to `output` in one step."""
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    if output.exists():
        output.rmdir()  # check_output saw it empty; fails loudly if something arrived since
    os.replace(partial, output)
    sync(output.absolute().parent)


def directory_bytes(path: Path) -> int:
    """Return the total size of the files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_disk(output: Path, needed_bytes: int) -> None:
    """Refuse, before any work, an emulator that the disk has no room for."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free_bytes = shutil.disk_usage(parent).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"{output}: needs {needed_bytes / GIB:.1f} GiB and {parent} has {free_bytes / GIB:.1f} GiB free; make "
            "room, take a smaller emulator or choose another --output"
        )
