"""Matrices that stay on disk (embeddings, the head), logits that are formed only by slices, and absent weights.

They stand in for tensors inside the model's own code. Shape, dtype and device answer as usual. The few operations that
models perform on them work on slices. Any other operation forms the whole tensor, or fails by name if that would be
large.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from onelayer.compiler.models.unit_memory import SLICE_BYTES
from onelayer.compiler.storage.checkpoint import Checkpoint


class OutsideTableError(IndexError):
    """A look-up beyond the last row of an embedding table; `index` is the largest requested row."""

    def __init__(self, index: int, rows: int) -> None:
        super().__init__(f"index {index} is outside an embedding of {rows} rows")
        self.index = index
        self.rows = rows


# What a stand-in can answer without its values.
PROPERTIES = ("shape", "dtype", "device", "layout", "requires_grad", "is_meta", "ndim")
METADATA = frozenset(getattr(torch.Tensor, name).__get__ for name in PROPERTIES) | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "__len__")
}


# Operations that only read: code between units may use them on a small weight of a unit that is not resident.
READING = frozenset(getattr(torch.Tensor, name).__get__ for name in ("T", "mT")) | {
    torch.Tensor.t, torch.Tensor.transpose, torch.Tensor.__getitem__, torch.Tensor.matmul, torch.matmul,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, F.linear, F.embedding,
}  # fmt: skip


class AbsentWeight(torch.Tensor):
    """A weight of a unit that is not resident. The code between units may use its metadata, and the values of a small
    weight, which are then read from disk."""

    values: Callable[[], torch.Tensor]

    @staticmethod
    def like(tensor: torch.Tensor, name: str, values: Callable[[str], torch.Tensor]) -> "AbsentWeight":
        """Return the stand-in for an empty (meta) parameter; `values(name)` reads its values to the host."""
        weight = tensor.detach().as_subclass(AbsentWeight)
        weight.values = partial(values, name)
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer metadata, with the host as device, since models move inputs to the device of their weights."""
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu")
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func not in READING:
            raise TypeError(f"{getattr(func, '__name__', func)} needs the values of a weight outside its unit")
        return func(
            *(_values(item, func) for item in args), **{name: _values(item, func) for name, item in kwargs.items()}
        )


def _values(item: Any, func: Any) -> Any:
    if not isinstance(item, AbsentWeight):
        return item
    if item.numel() * item.dtype.itemsize > SLICE_BYTES:
        raise TypeError(f"{getattr(func, '__name__', func)} needs the values of a large weight outside its unit")
    return item.values()


class DiskMatrix(torch.Tensor):
    """A weight (rows, width) that is read by rows, for embedding look-ups and linear products."""

    read: Callable[[int, int], torch.Tensor]
    pick: Callable[[torch.Tensor], torch.Tensor]
    is_head: bool

    @staticmethod
    def over(
        checkpoint: Checkpoint, key: str, dtype: torch.dtype, device: torch.device, is_head: bool = False
    ) -> "DiskMatrix":
        """Return the tensor `key` of a checkpoint as if on `device` in `dtype`. A head's products are deferred."""
        shape = checkpoint.tensors[key].shape
        matrix = torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(DiskMatrix)
        matrix.read = lambda start, stop: checkpoint.read_rows(key, start, stop).to(device, dtype)
        matrix.is_head = is_head
        # Variants of a model request the rows of one batch one after the other.
        matrix.pick = _remembering_last(lambda rows: checkpoint.gather_rows(key, rows.cpu().numpy()).to(device, dtype))
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer metadata, compute the supported operations from slices, refuse everything else by name."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        return func(
            *(_whole(item, func) for item in args), **{name: _whole(item, func) for name, item in kwargs.items()}
        )

    def row_slices(self) -> Iterator[tuple[int, int]]:
        """Return bounds of consecutive row ranges of at most `SLICE_BYTES` each."""
        rows, width = self.shape
        step = max(1, SLICE_BYTES // (width * self.dtype.itemsize))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _remembering_last(pick: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def remembered(rows: torch.Tensor) -> torch.Tensor:
        nonlocal last
        if last is None or not torch.equal(last[0], rows):
            last = rows, pick(rows)
        return last[1]

    return remembered


def _embedding(ids: torch.Tensor, matrix: DiskMatrix, *args: Any, **kwargs: Any) -> torch.Tensor:
    rows, inverse = torch.unique(ids, return_inverse=True)
    if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < matrix.shape[0]:
        raise OutsideTableError(int(rows[-1]), matrix.shape[0])
    # Padding index, frequency scaling and sparsity concern gradients only; a norm bound would edit the table in place.
    max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
    if max_norm is not None:
        raise TypeError("an embedding with max_norm edits its table and cannot be read by rows")
    return F.embedding(inverse, matrix.pick(rows))


def _whole(item: Any, func: Any) -> Any:
    """Read a small matrix whole for any other operation; refuse a large one."""
    if not isinstance(item, DiskMatrix):
        return item
    rows, width = item.shape
    if rows * width * item.dtype.itemsize > SLICE_BYTES:
        raise TypeError(f"{getattr(func, '__name__', func)} needs the whole of a matrix that is read by rows")
    return item.read(0, rows)


def _linear(x: torch.Tensor, matrix: DiskMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    if matrix.is_head:
        return DeferredLogits.over(x, matrix, bias)
    parts = [
        F.linear(x, matrix.read(start, stop), None if bias is None else bias[start:stop])
        for start, stop in matrix.row_slices()
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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


class DeferredLogits(torch.Tensor):
    """Logits (..., vocabulary) of a head whose weight stays on disk: the hidden states and the operations on them.

    Elementwise operations (soft caps, scales, casts) and values set for some tokens are recorded and applied to each
    slice. Any other operation forms the whole logits, which is correct and costs their memory. An operation that would
    change them in place is refused by name, since its change would be lost.
    """

    hidden: torch.Tensor
    head: DiskMatrix
    bias: torch.Tensor | None
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]

    @staticmethod
    def over(hidden: torch.Tensor, head: DiskMatrix, bias: torch.Tensor | None) -> "DeferredLogits":
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
        args = tuple(item.materialize() if isinstance(item, DeferredLogits) else item for item in args)
        return func(*args, **kwargs)

    def slice_of(self, hidden: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return logits `start:stop` of some hidden rows, given those rows of the head's weight."""
        part = F.linear(hidden, weight, None if self.bias is None else self.bias[start:stop])
        for func, args, kwargs in self.steps:
            part = _fill(part, *args, start) if func is _fill else func(part, *args, **kwargs)
        return part

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
    hidden: torch.Tensor, head: DiskMatrix, bias: torch.Tensor | None, steps: tuple[Any, ...], dtype: torch.dtype
) -> DeferredLogits:
    shape = (*hidden.shape[:-1], head.shape[0])
    logits = torch.empty((), dtype=dtype, device=hidden.device).expand(shape).as_subclass(DeferredLogits)
    logits.hidden, logits.head, logits.bias, logits.steps = hidden, head, bias, steps
    return logits
