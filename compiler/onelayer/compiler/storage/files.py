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
            raise InputError(f"{path}: is not a file; {remedy}")
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


def check_output(output: Path) -> None:
    """Refuse an output directory that exists with files in it, or that cannot be made, before any work starts."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output}: exists and is not a directory; choose another --output")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: already holds files; remove it or choose another --output")
    parent = output.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{output}: cannot be made, {parent} is not a directory; choose another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{output}: cannot be written, no permission in {parent}; choose another --output")


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


# Weights in any format: the originals of what is being rewritten, which must not lie next to the result.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer, templates, license and cards; hidden files (a repository's history) are left out."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if path.is_dir():
            (target / path.name).mkdir(exist_ok=True)
            copy_companions(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


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
