"""Reading ahead: order, bound, errors in place of results, and no thread left running."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from onelayer.compiler.machine.threads import read_ahead, single_threaded


def test_results_come_in_order_and_no_more_than_allowed_wait() -> None:
    begun: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(9):
            begun.append(number)
            yield lambda number=number: number * number  # type: ignore[misc]

    seen = []
    for result in read_ahead(jobs(), 2):
        seen.append(result)
        assert len(begun) <= len(seen) + 3
    assert seen == [number * number for number in range(9)]


def test_an_error_surfaces_in_its_place_and_stops_the_rest() -> None:
    done: list[int] = []

    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            if number == 2:
                raise OSError("disk error")
            done.append(number)
            return number

        return work

    results = read_ahead((job(number) for number in range(99)), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk error"):
        next(results)
    assert len(done) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_leaving_early_leaves_no_thread() -> None:
    results = read_ahead((lambda: 1 for _ in range(99)), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single_threaded():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
