"""Threads: reading ahead while something else computes, and computing on one thread.

In: callables. Out: their results in order, computed ahead in threads of their own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def read_ahead(jobs: Iterable[Callable[[], T]], depth: int = 2, threads: int = 1) -> Iterator[T]:
    """Yield the results of `jobs` in order, with at most `depth` waiting; raise an error in place of its result.

    `threads` jobs run at once. Leaving the loop early cancels the jobs that have not begun.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch compute on this thread only; restore its thread count on exit.

    Use this for small matrix products that fit in one core's cache. Spread over threads they mostly wait for each
    other, up to 50x slower on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
