"""Reading that overlaps computing: callables in, their results out in order, done ahead in threads of their own."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def read_ahead(jobs: Iterable[Callable[[], T]], depth: int = 2, threads: int = 1) -> Iterator[T]:
    """Results of `jobs` in their order, at most `depth` of them waiting; an error surfaces where its result would.

    `threads` of them are done at once. Leaving the loop early cancels those that have not begun.
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
    """Torch computes on this thread alone meanwhile.

    For products of blocks that fit a core's cache: shared out among threads they wait for each other more than they
    compute, and on a busy machine fifty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
