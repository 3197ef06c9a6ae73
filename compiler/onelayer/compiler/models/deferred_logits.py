"""Logits that are formed only by slices: a stand-in for the product of hidden states with a head on disk.

Shape, dtype and device answer as usual. The few operations that models perform on logits are recorded and applied to
each slice, or work slice by slice. Any other operation forms the whole logits, which is correct and costs their memory.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F

# What a stand-in can answer without its values.
PROPERTIES = ("shape", "dtype", "device", "layout", "requires_grad", "is_meta", "ndim", "grad", "is_leaf")
METADATA = frozenset(getattr(torch.Tensor, name).__get__ for name in PROPERTIES) | {
    getattr(torch.Tensor, name)
    for name in (
        "size",
        "dim",
        "ndimension",
        "numel",
        "element_size",
        "untyped_storage",
        "is_floating_point",
        "is_complex",
        "__len__",
    )
}

# Elementwise operations on logits, which can be applied to a slice later.
ELEMENTWISE = frozenset(
    {
        torch.Tensor.mul, torch.Tensor.div, torch.Tensor.true_divide, torch.Tensor.add, torch.Tensor.sub,
        torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.__truediv__, torch.Tensor.__add__,
        torch.Tensor.__sub__, torch.Tensor.neg, torch.Tensor.tanh, torch.tanh, torch.mul, torch.div, torch.add,
        torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to, torch.Tensor.type,
        torch.Tensor.contiguous, torch.Tensor.detach, torch.clamp, torch.Tensor.clamp,
        torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.__imul__, torch.Tensor.__itruediv__,
    }
)  # fmt: skip

# Those that keep nothing for their derivative, and change no value but by rounding.
CASTS = frozenset(
    {
        torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to, torch.Tensor.type,
        torch.Tensor.contiguous, torch.Tensor.detach,
    }
)  # fmt: skip

# Operations that give other positions, or the same in another shape; the last dimension stays the vocabulary.
RESHAPING = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape})
# Functions of whole logits that have a form by slices, by the torch function; it may return NotImplemented.
BY_SLICES: dict[Any, Callable[..., Any]] = {}


class Head(Protocol):
    """A head's weight (vocabulary, width) that is read by rows."""

    shape: torch.Size

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows `start:stop`."""

    def row_slices(self) -> Iterator[tuple[int, int]]:
        """Return bounds of consecutive row ranges of limited size."""


class DeferredLogits(torch.Tensor):
    """Logits (..., vocabulary) of a head whose weight stays on disk: the hidden states and the operations on them.

    Elementwise operations (soft caps, scales, casts) and values set for some tokens are recorded and applied to each
    slice; positions can be picked and given another shape. An operation that would change logits in place is refused by
    name, since its change would be lost.
    """

    hidden: torch.Tensor
    head: Head
    bias: torch.Tensor | None
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]

    @staticmethod
    def over(hidden: torch.Tensor, head: Head, bias: torch.Tensor | None) -> "DeferredLogits":
        """Return `hidden @ head.T + bias`, deferred."""
        return _deferred(hidden, head, bias, (), hidden.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer metadata, record elementwise operations, do everything else on the whole logits."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        logits, name = args[0], getattr(func, "__name__", str(func))
        # Operators like += without support here fall back to their plain form, which returns a new tensor.
        in_place = name in ("__setitem__", "__imul__", "__itruediv__") or re.fullmatch(r".*[^_]_", name) is not None
        if func in ELEMENTWISE and isinstance(logits, DeferredLogits) and all(t.dim() == 0 for t in tensors[1:]):
            probe = func(torch.zeros(1, dtype=logits.dtype), *args[1:], **kwargs)
            steps = (*logits.steps, (func, args[1:], kwargs))
            if not in_place:
                return _deferred(logits.hidden, logits.head, logits.bias, steps, probe.dtype)
            logits.steps = steps
            return logits
        if in_place and isinstance(logits, DeferredLogits):
            columns = _columns(logits, args[1]) if name == "__setitem__" else None
            if columns is None or not isinstance(args[2], int | float):
                raise TypeError(f"{name} changes logits that are not formed yet")
            logits.steps = (*logits.steps, (_fill, (columns, args[2]), {}))
            return None
        if isinstance(logits, DeferredLogits) and (hidden := _moved(func, logits, args[1:], kwargs)) is not None:
            return logits.over_other(hidden)
        if func in BY_SLICES and (result := BY_SLICES[func](*args, **kwargs)) is not NotImplemented:
            return result
        args = tuple(item.materialize() if isinstance(item, DeferredLogits) else item for item in args)
        return func(*args, **kwargs)

    def slice_of(self, hidden: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return logits `start:stop` of some hidden rows, given those rows of the head's weight."""
        part = F.linear(hidden, weight, None if self.bias is None else self.bias[start:stop])
        for func, args, kwargs in self.steps:
            part = _fill(part, *args, start) if func is _fill else func(part, *args, **kwargs)
        return part

    @property
    def derived_copies(self) -> int:
        """How many copies of a slice the derivative of the recorded operations holds at most; casts hold none."""
        return sum(func not in CASTS for func, _, _ in self.steps)

    def over_other(self, hidden: torch.Tensor) -> "DeferredLogits":
        """Return the same head and operations over other hidden states."""
        return _deferred(hidden, self.head, self.bias, self.steps, self.dtype)

    def materialize(self) -> torch.Tensor:
        """Form the whole logits."""
        parts = [
            self.slice_of(self.hidden, self.head.read(start, stop), start, stop)
            for start, stop in self.head.row_slices()
        ]
        return torch.cat(parts, dim=-1)


def _moved(func: Any, logits: DeferredLogits, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
    """Return the hidden states of an operation that only moves positions; None for any other operation."""
    hidden = logits.hidden
    if func is torch.Tensor.__getitem__:
        key = args[0] if isinstance(args[0], tuple) else (args[0],)
        if all(part is Ellipsis or isinstance(part, int | slice) for part in key):
            given = [part for part in key if part is not Ellipsis]
            reaches_last = len(given) == logits.dim() or (len(given) < len(key) and key[-1] is not Ellipsis)
            if not reaches_last or given[-1] == slice(None):
                return hidden[args[0]]
    if func in RESHAPING and not kwargs:
        shape = args[0] if isinstance(args[0], tuple | list | torch.Size) else args
        if len(shape) > 1 and shape[-1] in (-1, logits.shape[-1]) and (shape[-1] != -1 or -1 not in shape[:-1]):
            lead = hidden.reshape(*shape[:-1], hidden.shape[-1])
            return lead if lead.shape[:-1].numel() == logits.shape[:-1].numel() else None
    return None


def _columns(logits: DeferredLogits, key: Any) -> torch.Tensor | None:
    """Return the tokens that `logits[key]` selects for every position; None if it also selects positions."""
    *before, last = key if isinstance(key, tuple) else (key,)
    whole = [Ellipsis] if before == [Ellipsis] else [slice(None)] * (logits.dim() - 1)
    return torch.arange(logits.shape[-1])[last].reshape(-1) if before == whole else None


def _fill(part: torch.Tensor, columns: torch.Tensor, value: float, start: int) -> torch.Tensor:
    """Set `value` in those of `columns` that a slice of the logits, which begins at token `start`, holds."""
    columns = columns.to(part.device)
    inside = columns[(columns >= start) & (columns < start + part.shape[-1])] - start
    return part.index_fill(-1, inside, value)


def _deferred(
    hidden: torch.Tensor, head: Head, bias: torch.Tensor | None, steps: tuple[Any, ...], dtype: torch.dtype
) -> DeferredLogits:
    shape = (*hidden.shape[:-1], head.shape[0])
    logits = torch.empty((), dtype=dtype, device=hidden.device).expand(shape).as_subclass(DeferredLogits)
    logits.hidden, logits.head, logits.bias, logits.steps = hidden, head, bias, steps
    return logits
