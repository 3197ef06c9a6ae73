"""The costs of a pass: peak bytes, bytes read and seconds, shown while it runs and reported at its end."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from onelayer.compiler.results import Report

if TYPE_CHECKING:
    import torch


GIB = 1 << 30
_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.02
# Freed memory that a pass may gather from unit to unit; the reserve of every promise holds it twice.
_GROWTH_BYTES = 32 << 20


def anonymous_bytes() -> int:
    """Measure the memory of this process without file pages (a mapped checkpoint), which the system can drop."""
    if _STATM.exists():
        _, resident, shared, *_ = _STATM.read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def return_free_memory() -> None:
    """Return freed memory to the system; glibc keeps it per thread, out of reach of the next layer."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl lacks it and keeps nothing
        if trim is not None:
            trim(0)


class FreedMemory:
    """Returns freed memory to the system after units of a pass, where the process has grown since the first one.

    What one unit leaves serves the next. To give it back after each means to get it again, page by page: on a small
    model that took a third of an exact step's processor time (manifests/LOG.md).
    """

    def __init__(self) -> None:
        self._most_bytes: int | None = None

    def after_unit(self, kept_bytes: int) -> None:
        """Look at the memory between two units; `kept_bytes` of it are kept on purpose, by the batches."""
        now = anonymous_bytes() - kept_bytes
        if self._most_bytes is None:
            self._most_bytes = now + _GROWTH_BYTES
        elif now > self._most_bytes:
            return_free_memory()


class Meter:
    """Watches one pass: `with Meter(device) as meter: ...; meter.report(...)`. A thread samples the host's memory."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.note = ""  # a remark of the pass on the last unit, shown in the progress bar
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._start_seconds = time.perf_counter()
        self._start_bytes = self._peak_bytes = anonymous_bytes()
        self._earlier_bytes = self._earlier_reserved_bytes = 0  # the device's peaks before the last restart

    @property
    def on_gpu(self) -> bool:
        """Whether the device's own allocator counts the memory; otherwise the host's memory is counted."""
        return self.device.type != "cpu"

    @property
    def _allocator(self) -> Any:
        """The functions of the device's own allocator."""
        import torch

        return torch.get_device_module(self.device)

    def __enter__(self) -> "Meter":
        if self.on_gpu:
            self._allocator.reset_peak_memory_stats(self.device)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> int:
        """Measure the memory now; return the device peak so far in bytes."""
        self._peak_bytes = max(self._peak_bytes, anonymous_bytes())
        if self.on_gpu:
            return max(self._earlier_bytes, self.peak_since_restart)
        return self._peak_bytes - self._start_bytes

    def restart_peak(self) -> None:
        """Begin to measure `peak_since_restart`; the device peak of the whole pass stays known."""
        if self.on_gpu:
            self._earlier_bytes = self.sample()
            self._earlier_reserved_bytes = self.reserved_bytes or 0
            self._allocator.reset_peak_memory_stats(self.device)

    @property
    def peak_since_restart(self) -> int:
        """The most bytes that the device's allocator held since the last restart; 0 on a CPU."""
        return int(self._allocator.max_memory_allocated(self.device)) if self.on_gpu else 0

    @property
    def reserved_bytes(self) -> int | None:
        """The most that the device's allocator held so far, with what it keeps between uses; None on a CPU."""
        if not self.on_gpu:
            return None
        return max(self._earlier_reserved_bytes, int(self._allocator.max_memory_reserved(self.device)))

    def report(self, largest_unit_bytes: int, workspace_bytes: int, bytes_read: int) -> Report:
        """Return the figures of the pass so far."""
        return Report(
            largest_unit_bytes=largest_unit_bytes,
            workspace_bytes=workspace_bytes,
            peak_device_bytes=self.sample(),
            peak_host_bytes=self._peak_bytes,
            bytes_read=bytes_read,
            seconds=round(time.perf_counter() - self._start_seconds, 3),
            reserved_device_bytes=self.reserved_bytes,
        )
