"""Hooks that add the offsets of the present batch to the hidden states of a model's units."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from onelayer.compiler.factors.offsets import CodedOffset
from onelayer.runtime.anchors.hidden_states import hidden_states, with_hidden_states

# By unit, and by number among what the unit returns.
Offsets = Mapping[str, Mapping[int, CodedOffset]]
# The token ids that the model is called with, if it is called with some, and the offsets of that call.
Call = tuple[torch.Tensor | None, Offsets]


class AnchorHooks:
    """Hooks on `units` of `model`, by name, which do nothing outside of `anchored`.

    The sum keeps nothing for backward. So it costs no memory inside a layer that is recomputed either, and a repeated
    run adds the same offset.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, nn.Module]) -> None:
        self._offsets: Offsets = {}
        self._calls: Sequence[Call] = ()
        self._handles = [module.register_forward_hook(partial(self._add, name)) for name, module in units.items()]
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    @contextmanager
    def anchored(self, calls: Sequence[Call]) -> Iterator[None]:
        """Add offsets in every forward pass inside `with`, and in what its backward pass recomputes.

        If a batch takes several `calls`, each finds its own by its token ids. Only the last may have a backward pass.
        """
        self._calls, self._offsets = calls, calls[0][1]
        try:
            yield
        finally:
            self._calls, self._offsets = (), {}

    def remove(self) -> None:
        """Take the hooks off the units."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if len(self._calls) > 1:
            ids = kwargs["input_ids"].cpu()
            self._offsets = next(found for known, found in self._calls if known is not None and torch.equal(known, ids))

    def _add(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if name not in self._offsets:
            return None
        states, offsets = hidden_states(name, output), self._offsets[name]
        return with_hidden_states(output, {number: _moved(states[number], offsets[number]) for number in offsets})


def _moved(hidden: torch.Tensor, offset: CodedOffset) -> torch.Tensor:
    with torch.no_grad():
        step = offset.to(hidden.device).rebuild().to(hidden.dtype)
    return hidden + step
