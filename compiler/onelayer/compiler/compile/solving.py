"""Compresses the linears of a unit one after the other, and looks at what came out of all of them at once.

In: a solution of each linear, queued on the device. Out: what is stored of it, on the host. The host waits once for a
unit. A linear whose solution expected what did not hold, such as factors of full rank, is solved again with waits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from onelayer.compiler.compile.writer import StoredLinear
from onelayer.compiler.emulators.figures import LinearFigures
from onelayer.compiler.factors.expectations import LOOKING, Expectations
from onelayer.compiler.machine.meter import return_free_memory
from onelayer.compiler.machine.transfers import Arrivals

K = TypeVar("K")


@dataclass(frozen=True)
class Solved:
    """What replaces a weight, by the ending of its name; and how to tell its figures from `numbers` on the host."""

    tensors: Mapping[str, torch.Tensor]
    numbers: tuple[Any, ...]
    figures: Callable[..., LinearFigures]

    def stored(self) -> StoredLinear:
        """Return what is stored; the host waits if it is still on a device."""
        return StoredLinear(self.figures(*self.numbers), self.tensors)


def solve_all(
    keys: Iterable[K],
    solve: Callable[[K, Expectations], Solved],
    device: torch.device,
    void: Collection[K] = (),
) -> dict[K, StoredLinear]:
    """Solve for each key, in order; return what is stored of each, on the host.

    `solve` is called a second time, with expectations that look, for a key whose conditions did not hold. Those of
    `void` are known not to hold.
    """
    begun, arrivals, again = dict[K, tuple[Solved, Any] | None](), Arrivals(), list[K]()
    for key in keys:
        expected = Expectations(looks=device.type == "cpu" or key in void)
        try:
            begun[key] = _begin(solve(key, expected), expected, arrivals)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # PyTorch documents it
            if expected.looks:
                raise
            begun[key] = None  # it went on with what did not hold
            again.append(key)
    arrivals.wait()
    again += [key for key, found in begun.items() if found is not None and found[1] is not None and not found[1]]
    for key in again:
        begun[key] = _begin(solve(key, LOOKING), LOOKING, arrivals)
    arrivals.wait()
    return {key: found[0].stored() for key, found in begun.items() if found is not None}


def in_turn(keys: Iterable[K]) -> Iterator[K]:
    """Yield keys; after each, give free memory back: the next solver's would add to the holes that this one leaves."""
    for key in keys:
        yield key
        return_free_memory()


def _begin(solved: Solved, expected: Expectations, arrivals: Arrivals) -> tuple[Solved, torch.Tensor | None]:
    """Send what was solved to the host, and whether its conditions held."""
    tensors, numbers, held = arrivals.begin((dict(solved.tensors), solved.numbers, expected.all_held))
    return Solved(tensors, numbers, solved.figures), held
