"""A call and stand-ins for some of its tensors in; the call's result out, which backward recomputes from them.

This is torch's non-reentrant checkpoint around a closure. The first run sees the exact tensors, so the forward pass is
exact. Recomputation sees what the stand-ins rebuild. Backward changes nothing, so it can run again on a retained graph.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from onelayer.compiler.factors.activation_factors import ExactTensor
from onelayer.runtime.activations.routing import Routing


class StandIn(Protocol):
    """A stored form of a tensor that can rebuild it."""

    def rebuild(self) -> torch.Tensor:
        """Return the tensor, or an approximation of it, as a leaf."""


_PASSED = object()  # the place of a tensor that checkpoint itself stores


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in stored arguments."""

    stand_in: StandIn
    strides: tuple[int, ...]
    requires_grad: bool

    def fill(self) -> torch.Tensor:
        # Autograd must save the same tensors as in the first run, so this needs a gradient if the original does. It
        # also lies in memory as the original did, since operators choose what they save by the layout of their input.
        return _laid_out(self.stand_in.rebuild(), self.strides).requires_grad_(self.requires_grad)


@torch.no_grad()
def _laid_out(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor with these strides; a stride of zero repeats its first entry."""
    if tensor.stride() == strides:
        return tensor
    distinct = tensor[tuple(slice(None) if stride else slice(1) for stride in strides)]
    return distinct.new_empty_strided(distinct.shape, strides).copy_(distinct).expand(tensor.shape)


def checkpointed_call(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_ins: Mapping[int, StandIn],
    routing: Routing | None,
) -> Any:
    """Run `call(*args, **kwargs)`; of the tensors whose `id` is in `stand_ins`, keep only the stand-ins.

    Exact tensors stay tensors. `routing` is None for calls that make no discrete choices.
    """

    def slot(tensor: torch.Tensor) -> Any:
        stand_in = stand_ins.get(id(tensor))
        # An exact tensor is kept itself, so that checkpoint guards it like any other.
        if stand_in is None or isinstance(stand_in, ExactTensor):
            return tensor
        return _Slot(stand_in, tensor.stride(), tensor.requires_grad)

    # Checkpoint restores the random state of the devices of its arguments.
    marker = next(tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in stand_ins).detach().new_empty(0)
    first = [(args, kwargs)]
    keywords = replaced(kwargs, torch.Tensor, slot)
    # A tensor without a stand-in passes through checkpoint, which guards it against changes in place.
    slotted = [replaced(value, torch.Tensor, slot) for value in args]
    passed = [value for value in slotted if isinstance(value, torch.Tensor)]
    stored = [_PASSED if isinstance(value, torch.Tensor) else value for value in slotted]
    del args, kwargs, slotted

    def run(marker: torch.Tensor, *tensors: torch.Tensor) -> Any:
        if first:
            positional, named = first.pop()
            choices: AbstractContextManager[Any] = routing.record() if routing is not None else nullcontext()
        else:
            given = iter(tensors)
            filled = (replaced(value, _Slot, _Slot.fill) for value in stored)
            positional = tuple(next(given) if value is _PASSED else value for value in filled)
            named = replaced(keywords, _Slot, _Slot.fill)
            choices = routing.replay() if routing is not None else nullcontext()
        with choices:
            return call(*positional, **named)

    return checkpoint(run, marker, *passed, use_reentrant=False)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Replace every instance of `kind` in nested tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(replaced(item, kind, replace) for item in value)
    if type(value) is dict:
        return {name: replaced(item, kind, replace) for name, item in value.items()}
    return value
