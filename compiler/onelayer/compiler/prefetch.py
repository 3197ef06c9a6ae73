"""Work that is done ahead in a thread: callables in, their results out in order, so that reading overlaps computing."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(jobs: Iterable[Callable[[], T]], depth: int = 2) -> Iterator[T]:
    """Results of `jobs` in their order, at most `depth` of them waiting; an error surfaces where its result would.

    One thread does the jobs, one after the other. Leaving the loop early cancels those that have not begun.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
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
