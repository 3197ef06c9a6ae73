"""A limit on the time of Python code that came with a file: a chat template can loop for years."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitError(RuntimeError):
    """The code inside a `time_limit` took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitError` in the code inside if it takes longer; code that waits in a C function ends first."""
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeLimitError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
