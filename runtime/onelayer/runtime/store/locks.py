"""Locks on the artifacts of a store: one lock per key, one mark per use; a dead process holds neither."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.runtime.store.record import METADATA, Notify, silent

if TYPE_CHECKING:
    from filelock import FileLock


class BusyError(RuntimeError):
    """Another run is making an artifact, and the caller does not wait for it."""


class ArtifactLocks:
    """The locks of a store's artifacts, as files in `<root>/.locks`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._locks = root / ".locks"

    @contextlib.contextmanager
    def making(self, key: str, notify: Notify = silent, *, wait: bool = True) -> Iterator[None]:
        """Hold the right to make or remove an artifact.

        If another run has it, print a notice and wait; without `wait` raise `BusyError`.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = _lock(self._locks / f"{key}.lock")
        if not _acquired(lock):
            if not wait:
                raise BusyError(f"another run is working on {key[:12]}")
            notify(f"another run is working on {key[:12]}, waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def use(self, key: str) -> Iterator[None]:
        """Keep `prune` away from an artifact while it is used; many runs may use it at once."""
        with self.making(key):
            file = self._root / key / METADATA
            if not file.exists():
                raise RuntimeError(f"{file.parent} was removed by another process; run the command again")
            os.utime(file)  # `prune --older-than-days` counts from the last use
            mark = _lock(self._locks / f"{key}.{uuid.uuid4().hex}.use")
            mark.acquire()
        try:
            yield
        finally:
            mark.release()
            Path(mark.lock_file).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether an artifact is free to remove: no run makes or uses it. Never waits."""
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = _lock(self._locks / f"{key}.lock")
        if not _acquired(lock):
            yield False
            return
        try:
            yield all(_abandoned(mark) for mark in self._locks.glob(f"{key}.*.use"))
        finally:
            lock.release()


def _lock(file: Path) -> "FileLock":
    """Create the lock of a file without acquiring it."""
    from filelock import FileLock

    return FileLock(file)


def _acquired(lock: "FileLock") -> bool:
    """Acquire a lock if it is free, without waiting."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _abandoned(mark: Path) -> bool:
    """Return whether a process that died left a use mark, and remove such a mark."""
    lock = _lock(mark)
    if not _acquired(lock):
        return False
    lock.release()
    mark.unlink(missing_ok=True)
    return True
