"""Counts of the pretend device: bytes held, waits, transfers, float64 products; its streams and pinned memory."""

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

TOTAL_BYTES = 8 << 30
PRODUCT = ("compiler/onelayer", "runtime/onelayer")


def product_line() -> str:
    """The innermost line of the product that is running now, as `file.py:function`; "" below other code."""
    try:
        frame = sys._getframe(2)
    except ValueError:  # autograd's thread of the device has no Python frames below it
        return ""
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in PRODUCT):
            return f"{code.co_filename.rsplit('/', 1)[1]}:{code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class PretendStream:
    """A queue of copies that are done when somebody waits for them, so that a forgotten wait gives wrong values."""

    def __init__(self, device: Any = None, **fields: Any) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    def synchronize(self) -> None:
        """Do all queued copies while the host waits."""
        COUNTS.wait("stream")
        self.drain()

    def wait_stream(self, other: "PretendStream") -> None:
        """Order what follows on this stream after the other's copies; the host does not wait."""
        other.drain()

    def record_event(self, event: Any = None) -> "PretendEvent":
        """Mark the present end of the queue."""
        return PretendEvent(self)

    def wait_event(self, event: "PretendEvent") -> None:
        """Order what follows on this stream after an event."""
        event.stream.drain()

    def drain(self) -> None:
        """Do all queued copies."""
        while self.waiting:
            self.waiting.popleft()()


class PretendEvent:
    """A point in a stream."""

    def __init__(self, stream: PretendStream | None = None, **fields: Any) -> None:
        self.stream = stream or COUNTS.stream_now

    def record(self, stream: PretendStream | None = None) -> None:
        """Mark the present end of a stream."""
        self.stream = stream or COUNTS.stream_now

    def synchronize(self) -> None:
        """Let the host wait for the event."""
        COUNTS.wait("event")
        self.stream.drain()


class PretendModule:
    """`torch.pretend`: what PyTorch and the product ask a device's module for, and the counts of the tests."""

    Stream, Event = PretendStream, PretendEvent

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.default_stream_ = PretendStream()
        self.stream_now = self.default_stream_
        self.allocated_bytes = self.peak_bytes = self.recent_peak_bytes = 0
        self.limit_bytes: int | None = None
        self.waits: Counter[tuple[str, str]] = Counter()  # by kind and by the product's line
        self.transfers: Counter[tuple[str, str]] = Counter()  # by direction and kind, and by the product's line
        self.double_products: Counter[str] = Counter()  # multiplications in float64, by the product's line

    def reset(self) -> None:
        """Begin to count again; what is held stays counted."""
        self.waits.clear()
        self.transfers.clear()
        self.double_products.clear()
        self.limit_bytes = None
        self.peak_bytes = self.recent_peak_bytes = self.allocated_bytes

    def wait(self, kind: str) -> None:
        """Count one wait of the host for the device."""
        self.waits[kind, product_line()] += 1

    def took(self, size_bytes: int) -> None:
        """Count bytes that are held from now on. Raises `torch.OutOfMemoryError` above the limit."""
        with self.lock:
            self.allocated_bytes += size_bytes
            if self.limit_bytes is not None and self.allocated_bytes > self.limit_bytes:
                self.allocated_bytes -= size_bytes
                raise torch.OutOfMemoryError(f"pretend device: {size_bytes} bytes more than {self.limit_bytes}")
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
            self.recent_peak_bytes = max(self.recent_peak_bytes, self.allocated_bytes)

    def gave_back(self, size_bytes: int) -> None:
        """Count bytes that are held no more."""
        with self.lock:
            self.allocated_bytes -= size_bytes

    # ---- what a device's module answers -----------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        """Answer as a device that is ready."""
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        """Return the only device."""
        return 0

    def device_count(self) -> int:
        """Return that there is one device."""
        return 1

    def set_device(self, device: Any) -> None:
        """Accept the only device."""

    def synchronize(self, device: Any = None) -> None:
        """Let the host wait for everything."""
        self.wait("device")
        self.default_stream_.drain()

    def empty_cache(self) -> None:
        """Return nothing: no memory is kept."""

    def memory_allocated(self, device: Any = None) -> int:
        """Return the bytes that are held."""
        return self.allocated_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        """Return the most bytes that were held since the peak was reset."""
        return self.recent_peak_bytes

    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Return the bytes that are free, and all of them."""
        return TOTAL_BYTES - self.allocated_bytes, TOTAL_BYTES

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Measure the peak from here on; `peak_bytes` stays that of the test."""
        self.recent_peak_bytes = self.allocated_bytes

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the dtypes of autocast."""
        return [torch.float16, torch.bfloat16, torch.float32]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Return the state of the device's numbers, which are the host's."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the state of the device's numbers."""
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        """Leave the numbers to the host's seed."""

    manual_seed = manual_seed_all

    def current_stream(self, device: Any = None) -> PretendStream:
        """Return the stream in use."""
        return self.stream_now

    def default_stream(self, device: Any = None) -> PretendStream:
        """Return the stream that is in use by default."""
        return self.default_stream_

    @contextmanager
    def stream(self, stream: PretendStream) -> Iterator[None]:
        """Use another stream inside."""
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    def get_device_name(self, device: Any = None) -> str:
        """Return the name of the device."""
        return "pretend"


COUNTS = PretendModule()


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Whether the memory of a host tensor is memory that `pin_memory` made."""
    return hasattr(tensor.untyped_storage(), "_is_pinned")


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Copy a host tensor to memory that counts as pinned."""
    if is_pinned(tensor):
        return tensor
    copied = tensor.detach().clone()
    copied.untyped_storage()._is_pinned = True  # type: ignore[attr-defined]  # lives as long as the storage
    return copied


_real_empty_like: Any = torch.empty_like


def empty_like(tensor: torch.Tensor, *args: Any, **fields: Any) -> torch.Tensor:
    """Make an empty tensor, in memory that counts as pinned if `pin_memory` is set."""
    is_to_be_pinned = fields.pop("pin_memory", False)
    made: torch.Tensor = _real_empty_like(tensor, *args, **fields)
    return pin_memory(made) if is_to_be_pinned else made
