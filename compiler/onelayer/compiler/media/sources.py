"""A row's image or audio in, a source out whose bytes are read each time they are needed and never kept."""

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from onelayer.compiler.errors import InputError

MediaKind = Literal["image", "audio"]

MOST_BYTES = 256 << 20  # of one file: an hour of 16-bit audio at 32 kHz, ten times a large photograph
SUPPORTED = "write a path relative to the data file, a data URI, or an object with 'bytes'"


@dataclass(frozen=True)
class Folder:
    """Where the paths of a row lead: relative to `base`, never out of `root`."""

    base: Path
    root: Path


@dataclass(frozen=True)
class MediaSource:
    """One image or one recording of a row.

    `where` names the row and the field in messages, `name` the file. The bytes are in the file `path`, or, for bytes
    that the row itself held, at `start` of this process's spool file.
    """

    kind: MediaKind
    where: str
    name: str
    path: Path | None = None
    start: int = 0
    length_bytes: int = 0

    def read(self) -> bytes:
        """Read the bytes. Raises `InputError` if the file is gone or empty."""
        if self.path is None:
            return os.pread(_spool(), self.length_bytes, self.start)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self}: cannot be read ({error.strerror}); restore the file") from None
        if not data:
            raise InputError(f"{self}: the file is empty; restore it")
        return data

    def digest(self) -> str:
        """Compute the hex SHA-256 of the bytes."""
        return hashlib.sha256(self.read()).hexdigest()

    def __str__(self) -> str:
        """Name the row, the field and the file in a message."""
        return f"{self.where}: {self.name}"


def media_source(value: object, kind: MediaKind, where: str, folder: Folder | None) -> MediaSource:
    """Check what a row says of one image or recording: it exists, is not empty and lies inside the data.

    Without a `folder` (rows of the Hub) there are no files. Raises `InputError` for anything else.
    """
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if data is not None:
            return media_bytes(data, kind, where, str(value.get("path") or "embedded bytes"))
        value = value.get("path")
    if isinstance(value, bytes):
        return media_bytes(value, kind, where)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: holds no {kind}; {SUPPORTED}")
    if value.startswith("data:"):
        header, comma, text = value.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InputError(f"{where}: is no data URI of base64; write data:{kind}/...;base64,...")
        return decoded(text, kind, where)
    if "://" in value[:32]:
        raise InputError(f"{where}: {value}: addresses are not read; save the file next to the data and write its path")
    return _file(value, kind, where, folder)


def decoded(text: object, kind: MediaKind, where: str) -> MediaSource:
    """Return the source of a base64 text. Raises `InputError` if it is none."""
    try:
        if not isinstance(text, str):
            raise ValueError("not a string")
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{where}: not valid base64 ({error}); encode the {kind} again") from None
    return media_bytes(data, kind, where)


def media_bytes(data: Any, kind: MediaKind, where: str, name: str = "embedded bytes") -> MediaSource:
    """Return the source of bytes that a row holds; they move to a file, so that memory does not grow with the rows."""
    if not isinstance(data, bytes):
        raise InputError(f"{where}: field 'bytes' must hold bytes; {SUPPORTED}")
    if not data:
        raise InputError(f"{where}: {name}: no bytes; remove the row or fill it in")
    _check_size(len(data), f"{where}: {name}")
    spool = _spool()
    start = os.lseek(spool, 0, os.SEEK_END)
    written = 0
    while written < len(data):
        written += os.pwrite(spool, data[written:], start + written)
    return MediaSource(kind, where, name, None, start, len(data))


@cache
def _spool() -> int:
    """Open this process's file of embedded bytes; the system removes it when the process ends."""
    descriptor, name = tempfile.mkstemp(prefix="onelayer-media-")
    os.unlink(name)
    return descriptor


def _file(value: str, kind: MediaKind, where: str, folder: Folder | None) -> MediaSource:
    if folder is None:
        raise InputError(f"{where}: {value}: rows of the Hub have no files; give data with embedded bytes")
    path = folder.base / value
    try:
        status, real = path.stat(), path.resolve()
    except (OSError, ValueError) as error:  # a path may hold a null byte
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise InputError(f"{where}: {path}: {reason}; correct the path, it is relative to the data file") from None
    if not real.is_relative_to(folder.root.resolve()):
        raise InputError(f"{where}: {path}: lies outside {folder.root}; put the file into the folder of the data")
    if not S_ISREG(status.st_mode):
        raise InputError(f"{where}: {path}: is not a regular file; name a file with one {kind}")
    if not status.st_size:
        raise InputError(f"{where}: {path}: the file is empty; restore it")
    _check_size(status.st_size, f"{where}: {path}")
    return MediaSource(kind, where, str(path), path)


def _check_size(size_bytes: int, name: str) -> None:
    if size_bytes > MOST_BYTES:
        raise InputError(f"{name}: {size_bytes} bytes, and one file may have {MOST_BYTES}; make it smaller")
