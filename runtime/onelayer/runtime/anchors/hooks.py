"""Hooks that add the offsets of the present batch to the hidden states of a model's units."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from onelayer.compiler.factors.offsets import CodedOffset
from onelayer.runtime.anchors.hidden_states import hidden_state, with_hidden_state

Offsets = Mapping[str, CodedOffset]


class AnchorHooks:
    """Hooks on `units`, by name, which do nothing outside of `anchored`.

    The sum keeps nothing for backward. So it costs no memory inside a layer that is recomputed either, and a repeated
    run adds the same offset.
    """

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self._offsets: Offsets = {}
        self._handles = [module.register_forward_hook(partial(self._add, name)) for name, module in units.items()]

    @contextmanager
    def anchored(self, offsets: Offsets) -> Iterator[None]:
        """Add `offsets`, by unit, in every forward pass inside `with`, and in what its backward pass recomputes."""
        self._offsets = offsets
        try:
            yield
        finally:
            self._offsets = {}

    def remove(self) -> None:
        """Take the hooks off the units."""
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if name not in self._offsets:
            return None
        hidden = hidden_state(name, output)
        with torch.no_grad():
            offset = self._offsets[name].to(hidden.device).rebuild().to(hidden.dtype)
        return with_hidden_state(output, hidden + offset)
