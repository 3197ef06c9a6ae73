"""Modules of a unit that compute something else for a while: an emulator's factors in place of their weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def standing_in(module: nn.Module, forwards: Mapping[nn.Module, Forward]) -> Iterator[Forward]:
    """The forward of `module`, those of its parts (or its own) that `forwards` names replaced meanwhile."""
    inner = [part for part in forwards if part is not module]
    for part in inner:
        # An instance attribute hides the class's forward from `__call__` and is gone when deleted.
        part.forward = forwards[part]
    try:
        # A unit's own forward is the stream's stub, so it is called past that.
        own = type(module).forward
        yield forwards.get(module) or (lambda *args, **kwargs: own(module, *args, **kwargs))
    finally:
        for part in inner:
            del part.forward
