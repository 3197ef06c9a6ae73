"""What a pass shows while it runs: notices, progress, and a clean stop on Ctrl-C."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from tqdm import tqdm

from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import GIB


def notice(text: str) -> None:
    """Print a notice to stderr, above any progress bar: something was not done exactly as requested."""
    if processes().is_first:
        tqdm.write(f"onelayer: note: {text}", file=sys.stderr)


def capped(option: str, wanted: int, available: int) -> int:
    """Return `wanted` examples for a step, or all available; print a notice if there are fewer than wanted."""
    if wanted > available:
        notice(f"{option} {wanted}: there are {available} examples, a step takes each of them once")
    return min(wanted, available)


# How often a pass says how far it is if stderr is no terminal.
LINE_SECONDS = 30.0


class ProgressLines:
    """The interface of a bar for stderr that is no terminal: a plain line every `LINE_SECONDS`, none for short work."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0) -> None:
        self.total, self.n, self._description, self._unit = total, initial, desc, unit
        self._first, self._note = initial, ""
        self._started = self._printed = time.monotonic()

    def update(self, count: int) -> None:
        """Note that `count` more units are done. Their line is printed when their note is known."""
        self.n += count

    def set_description(self, text: str, refresh: bool = False) -> None:
        """Name the work that follows."""
        self._description = text

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """Take the note on the last unit, and print a line if it is time for one."""
        now = time.monotonic()
        if now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        elapsed, done = now - self._started, self.n - self._first
        left = f"about {tqdm.format_interval((self.total - self.n) * elapsed / done)}" if done else "an unknown time"
        times = f"{tqdm.format_interval(elapsed)} elapsed, {left} left"
        line = f"onelayer: {self._description}: {self.n} of {self.total} {self._unit}s, {text}, {times}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print nothing: the result follows."""


def open_bar(total: int, description: str, unit: str, initial: int = 0) -> Any:
    """Open a bar on stderr, or what prints lines in its place if stderr is no terminal. Only process 0 shows one."""
    if not processes().is_first:
        return tqdm(disable=True)
    if sys.stderr.isatty():
        # What is left is estimated by the mean of all units: single ones differ, such as a step that renews anchors.
        return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False, smoothing=0)
    return ProgressLines(total, description, unit, initial)


class Shown(Protocol):
    """Shows how far a stream is."""

    def reached(self, count: int, unit: str, peak_bytes: int, note: str = "") -> None:
        """Show that `count` units are done; units that no batch visits are skipped."""


class Progress:
    """Progress over units on stderr, with an ETA, the current unit and the peak."""

    def __init__(self, total: int, description: str) -> None:
        self.base = 0  # the count that earlier passes of the same work reached
        self._bar = open_bar(total, description, "unit")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, base: int, description: str) -> None:
        """Begin the next pass, at its place in the whole work, with its name."""
        self.base = base
        self._bar.set_description(description, refresh=False)

    def reached(self, count: int, unit: str, peak_bytes: int, note: str = "") -> None:
        """Show that `count` units are done; units that no batch visits are skipped."""
        if self.base + count > self._bar.n:
            self._bar.update(self.base + count - self._bar.n)
        parts = (unit, note, f"peak {peak_bytes / GIB:.2f} GiB")
        self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)


class StopRequest:
    """Turns SIGINT and SIGTERM into a stop at the next boundary of the work's `unit`; a second signal stops at once."""

    def __init__(self, unit: str = "unit") -> None:
        self._asked = False
        self._unit = unit
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # A launcher sends SIGTERM to all when one fails, which says why.
        if processes().is_first and (processes().is_alone or number == signal.SIGINT):
            os.write(2, f"\nstopping when this {self._unit} is finished; interrupt again to stop now\n".encode())

    def is_asked(self) -> bool:
        """Return whether a stop was requested of any process; every process calls this at the same places."""
        return processes().any(self._asked)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if a stop was requested of any process."""
        if self.is_asked():
            raise KeyboardInterrupt
