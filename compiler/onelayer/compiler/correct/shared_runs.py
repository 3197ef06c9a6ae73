"""Runs variants of a model that are still the same only once: the first one runs, the others take copies of its output.

Until the first unit that makes a difference, all variants of a batch are one: in a vision tower that no adapter
touches, in layers before the first adapted one, and after a correction that reached no candidate's limit.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.recorded_outputs import asked_outputs
from onelayer.compiler.streaming.unit_boundary import CACHES, call_with_containers, fill_containers, with_contents


class SharedRuns:
    """Which of some variants have been the same in all units so far: `first[v]` is the first that is equal to v."""

    def __init__(self, variants: int) -> None:
        """Begin with variants that are all the same."""
        self.first = [0] * variants
        self._calls: Counter[tuple[int, int]] = Counter()
        self._outputs: dict[tuple[int, int, int], tuple[Any, int]] = {}

    def split(self, alike: Callable[[int, int], bool]) -> None:
        """Tell apart what is no longer `alike`: variants that do different things in the unit that runs next."""
        before, self.first = self.first, []
        for variant, group in enumerate(before):
            firsts = (other for other in dict.fromkeys(self.first) if before[other] == group)
            self.first.append(next((other for other in firsts if alike(other, variant)), variant))

    def enter_unit(self) -> None:
        """Begin to count the calls in a unit that became resident."""
        assert not self._outputs, "every variant takes the output that waits for it"
        self._calls.clear()

    def run(self, unit: Unit, batch: int, variant: int, args: Any, kwargs: Any) -> Any:
        """Run a unit for one variant of a batch, or return what its first equal returned in the same call."""
        if asked_outputs() is not None or any(isinstance(leaf, CACHES) for leaf in tree_leaves((args, kwargs))):
            return unit.forward(*args, **kwargs)  # what a call leaves elsewhere cannot be copied
        first = self.first[variant]
        call = (batch, first, self._calls[batch, variant])
        self._calls[batch, variant] += 1
        arguments, contents = with_contents((args, kwargs))
        if variant != first:
            output, takers = self._outputs.pop(call)
            if takers > 1:
                self._outputs[call] = (_copied(output), takers - 1)
            return fill_containers(arguments, output)
        output = call_with_containers(lambda args, kwargs: unit.forward(*args, **kwargs), arguments, contents)
        takers = self.first.count(first) - 1
        if takers:
            self._outputs[call] = (_copied(output), takers)
        return fill_containers(arguments, output)


def _copied(values: Any) -> Any:
    """Copy the tensors of a tree: the code between units may change its own in place."""
    return tree_map_only(torch.Tensor, torch.clone, values)
