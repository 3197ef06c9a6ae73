"""Matrices that stay on disk (embeddings, the head), and absent weights.

They stand in for tensors inside the model's own code. Shape, dtype and device answer as usual. The few operations that
models perform on them work on slices. Any other operation forms the whole tensor, or fails by name if that would be
large.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from onelayer.compiler.errors import InputError
from onelayer.compiler.models.deferred_logits import METADATA, DeferredLogits
from onelayer.compiler.models.unit_memory import SLICE_BYTES
from onelayer.compiler.storage.checkpoint import Checkpoint


class OutsideTableError(IndexError):
    """A look-up beyond the last row of an embedding table; `index` is the largest requested row."""

    def __init__(self, index: int, rows: int) -> None:
        super().__init__(f"index {index} is outside an embedding of {rows} rows")
        self.index = index
        self.rows = rows


# What trainers do with every parameter of a model, the frozen ones too.
FROZEN = frozenset({torch.Tensor.detach, torch.Tensor.requires_grad_})
SETS_GRADIENTS = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def _of_frozen(func: Any, args: tuple[Any, ...], values: Callable[[], torch.Tensor]) -> Any:
    """Do what can be done with a stored weight without its values, or with a copy of them; else NotImplemented."""
    if func is torch.Tensor.cpu:
        return values()
    if func is torch.Tensor.__deepcopy__:
        return torch.nn.Parameter(values(), requires_grad=False)
    if func in (SETS_GRADIENTS, torch.Tensor.requires_grad_) and (len(args) < 2 or args[1]):
        raise InputError("weights of a streamed original do not change; train an adapter (peft.get_peft_model)")
    if func == SETS_GRADIENTS:
        return None
    return args[0] if func in FROZEN else NotImplemented


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
        if (
            isinstance(args[0], AbsentWeight)
            and (result := _of_frozen(func, args, args[0].values)) is not NotImplemented
        ):
            return result
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
        if isinstance(args[0], DiskMatrix):
            matrix = args[0]
            if (result := _of_frozen(func, args, lambda: matrix.read(0, len(matrix)))) is not NotImplemented:
                return result
            if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step in (None, 1):
                return matrix.read(*args[1].indices(len(matrix))[:2])
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
