"""What a pass costs: peak bytes, bytes read, seconds, shown while it runs and reported when it ends."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from onelayer.compiler.results import Report

if TYPE_CHECKING:
    import torch


GIB = 1 << 30
_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Memory of this process that no file backs; file pages (a mapped checkpoint) can be dropped and do not count."""
    if _STATM.exists():
        _, resident, shared, *_ = _STATM.read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_info().rss)


def return_free_memory() -> None:
    """Give freed memory back to the system; glibc keeps it per thread, where the next layer may not find it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing
        if trim is not None:
            trim(0)


class Meter:
    """Watches one pass: `with Meter(device) as meter: ...; meter.report(...)`. A thread samples the host's memory."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.note = ""  # what the pass has to say about the unit behind it, for whoever watches
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._start_seconds = time.perf_counter()
        self._start_bytes = self._peak_bytes = anonymous_bytes()

    @property
    def on_gpu(self) -> bool:
        """Whether the device's own allocator says what is held; else the host's memory does."""
        return self.device.type == "cuda"

    def __enter__(self) -> "Meter":
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
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
        """Look at the memory now; returns the device peak so far in bytes."""
        self._peak_bytes = max(self._peak_bytes, anonymous_bytes())
        if self.on_gpu:
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return self._peak_bytes - self._start_bytes

    def report(self, largest_unit_bytes: int, workspace_bytes: int, bytes_read: int) -> Report:
        """The figures of the pass so far."""
        return Report(
            largest_unit_bytes=largest_unit_bytes,
            workspace_bytes=workspace_bytes,
            peak_device_bytes=self.sample(),
            peak_host_bytes=self._peak_bytes,
            bytes_read=bytes_read,
            seconds=round(time.perf_counter() - self._start_seconds, 3),
        )
