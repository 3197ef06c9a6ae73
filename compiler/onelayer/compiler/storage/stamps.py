"""Notices that a file changed while a command read it: the file's stamps, taken before the first read and compared.

Content that was replaced and then restored leaves the same digest, but never the same stamp: the system sets the time
of the last change (ctime), and no program can set it back.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from onelayer.compiler.errors import InputError

# Device, inode, size, time of the last write, time of the last change of any kind.
Stamp = tuple[int, int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what tells one state of a file from another."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FileStamps:
    """The files that a command reads, each with its stamp from before the first read."""

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._states: dict[Path, tuple[os.stat_result, ...]] = {}
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        """Take the stamps of further files; call it before they are read."""
        self._states |= {file: _states(file) for file in files}

    def check(self) -> None:
        """Raise `InputError` naming the first file that is not as it was."""
        for file, before in self._states.items():
            now = _states(file)
            if len(before) != len(now) or not all(map(_same, before, now)):
                raise InputError(f"{file}: changed while it was read; leave it alone and run the same command again")


def _states(file: Path) -> tuple[os.stat_result, ...]:
    """Return the state of a path itself and of the file it leads to; less for a file that is missing."""
    try:
        return (file.lstat(), file.stat())
    except OSError:
        return ()


def _same(before: os.stat_result, now: os.stat_result) -> bool:
    """Whether the content stayed; a hard link that was made or removed changes the ctime and nothing else."""
    ends_before, ends_now = stamp_of(before), stamp_of(now)
    return ends_before == ends_now or (before.st_nlink != now.st_nlink and ends_before[:-1] == ends_now[:-1])
