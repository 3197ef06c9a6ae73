"""Several runs of one pipeline in step: each calls its components, and each call streams once for all of the runs.

In: what runs the pipeline for each prompt. Out: what each returns. Every run has a greenlet of its own. A component's
method is a stub that parks the run with its arguments, and the answer wakes it up.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet


@dataclass(frozen=True)
class Call:
    """One call of a component, by its name."""

    part: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Lockstep:
    """Runs that have begun. `waiting` are their calls by number, `results` what those that ended returned.

    `stubs` surrounds the code of a run: inside it, components call what it is given in place of their methods.
    """

    def __init__(
        self,
        runs: Sequence[Callable[[], Any]],
        stubs: Callable[[Callable[[str], Callable[..., Any]]], AbstractContextManager[Any]],
    ) -> None:
        """Let every run reach its first call."""
        self.waiting: dict[int, Call] = {}
        self.results: dict[int, Any] = {}
        self._stubs = stubs
        self._workers = [greenlet(run) for run in runs]

    def __enter__(self) -> "Lockstep":
        try:
            for number in range(len(self._workers)):
                self._advance(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():  # what a run restores as it ends is what was here when it began
            for worker in filter(None, self._workers):  # those that have begun and not ended
                worker.throw()  # GreenletExit: unwinds the pipeline's frames, returns here

    def calls(self) -> Iterator[tuple[str, list[int], list[Call]]]:
        """Yield the calls that wait for one component, with the numbers of their runs, until every run has ended."""
        while self.waiting:
            part = self.waiting[min(self.waiting)].part
            numbers = [number for number, call in sorted(self.waiting.items()) if call.part == part]
            yield part, numbers, [self.waiting[number] for number in numbers]

    def answer(self, number: int, value: Any) -> None:
        """Give a run the answer to its call."""
        del self.waiting[number]
        self._advance(number, value)

    def _advance(self, number: int, *value: Any) -> None:
        worker = self._workers[number]
        with torch.no_grad(), warnings.catch_warnings(), self._stubs(lambda part: partial(_parked, part)):
            warnings.simplefilter("ignore")  # pipelines deprecate what they do themselves
            found = worker.switch(*value)
        if worker.dead:
            self.results[number] = found
        else:
            self.waiting[number] = found


def _parked(part: str, *args: Any, **kwargs: Any) -> Any:
    driver = getcurrent().parent
    assert driver is not None, f"{part} was called outside of a run"
    return driver.switch(Call(part, args, kwargs))
