"""What a pass costs: peak bytes, bytes read, seconds, shown while it runs and reported when it ends."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.02


class Result(BaseModel):
    """What a command returns; `model_dump(mode="json")` is its `--json` document."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Report(Result):
    """The figures that every streamed command ends with, all measured but `workspace_bytes`, which is predicted.

    On a GPU `peak_device_bytes` is what its allocator handed out at most; on a CPU it is how far the process's
    anonymous memory grew during the pass. `peak_host_bytes` is the anonymous memory of the whole process at its peak.
    """

    largest_unit_bytes: int
    workspace_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    seconds: float


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


def note(text: str) -> None:
    """Tell a person what was done otherwise than asked: one line on stderr, above any bar."""
    tqdm.write(f"onelayer: note: {text}", file=sys.stderr)


def at_most(option: str, wanted: int, available: int) -> int:
    """`wanted` examples of a step, or all there are: more would only take some of them twice, so that is noted."""
    if wanted > available:
        note(f"{option} {wanted}: there are {available} examples, a step takes each of them once")
    return min(wanted, available)


class Progress:
    """A bar over units on stderr with an ETA, the current unit and the peak; silent where stderr is no terminal."""

    def __init__(self, total: int, description: str) -> None:
        self.base = 0  # what earlier passes of the same work have reached
        self._bar: Any = tqdm(total=total, desc=description, unit="unit", disable=None, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, base: int, description: str) -> None:
        """The next pass begins: where it stands in the whole, and its name."""
        self.base = base
        self._bar.set_description(description, refresh=False)

    def reached(self, count: int, unit: str, peak_bytes: int, note: str = "") -> None:
        """The pass stands behind the unit number `count`; units that no batch visits are passed over."""
        if self.base + count > self._bar.n:
            self._bar.update(self.base + count - self._bar.n)
        parts = (unit, note, f"peak {peak_bytes / GIB:.2f} GiB")
        self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
