"""Discrete choices in a block (which experts, which positions): recorded when it first runs, repeated when it reruns.

A block that is recomputed from an approximate input would route tokens differently. So the choice is stored, and its
values are taken from the recomputed input, so that gradients flow to the experts that were used.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INT16_CHOICES = 1 << 15

# Functions that return values with their positions, and functions that return positions alone.
_WITH_VALUES: dict[Any, Any] = {
    torch.topk: torch.return_types.topk,
    torch.Tensor.topk: torch.return_types.topk,
    torch.sort: torch.return_types.sort,
    torch.Tensor.sort: torch.return_types.sort,
    torch.max: torch.return_types.max,
    torch.Tensor.max: torch.return_types.max,
    torch.min: torch.return_types.min,
    torch.Tensor.min: torch.return_types.min,
}
_POSITIONS = {torch.argmax, torch.Tensor.argmax, torch.argmin, torch.Tensor.argmin, torch.argsort, torch.Tensor.argsort}


class Routing:
    """The choices of one call of one block, in order."""

    def __init__(self) -> None:
        self._choices: list[torch.Tensor] = []

    @property
    def saved_bytes(self) -> int:
        """Bytes of the stored choices."""
        return sum(choice.numel() * choice.element_size() for choice in self._choices)

    @property
    def has_choices(self) -> bool:
        """Whether the block made any choice."""
        return bool(self._choices)

    def record(self) -> TorchFunctionMode:
        """Return a mode in which choices are made and stored."""
        self._choices.clear()
        return _Choices(self._make)

    def replay(self) -> TorchFunctionMode:
        """Return a mode in which the stored choices are repeated."""
        left = iter(tuple(self._choices))
        return _Choices(lambda choose, size: _next(left))

    def _make(self, choose: Callable[[], torch.Tensor], size: int) -> torch.Tensor:
        positions = choose()
        self._choices.append(positions.to(torch.int16) if size <= _INT16_CHOICES else positions)
        return positions


def _next(left: Iterable[torch.Tensor]) -> torch.Tensor:
    positions = next(iter(left), None)
    assert positions is not None, "a block makes more choices when it is recomputed than it made at first"
    return positions.long()


class _Choices(TorchFunctionMode):
    """Asks `decide` for the positions of every choice among floats; values are gathered by them."""

    def __init__(self, decide: Callable[[Callable[[], torch.Tensor], int], torch.Tensor]) -> None:
        super().__init__()
        self._decide = decide

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _WITH_VALUES and func not in _POSITIONS:
            return func(*args, **kwargs)
        source, *rest = args if args else (kwargs.pop("input"),)
        if not source.is_floating_point():
            return func(source, *rest, **kwargs)
        with torch.no_grad():
            result = func(source, *rest, **kwargs)
        if func in _POSITIONS:
            return self._decide(lambda: result, source.numel())
        if isinstance(result, torch.Tensor):  # max and min over everything, or of two tensors
            return func(source, *rest, **kwargs)
        dimension = _dimension(func, rest, kwargs)
        positions = self._decide(lambda: result[1], source.shape[dimension])
        reduced = result[1].ndim < source.ndim
        values = source.gather(dimension, positions.unsqueeze(dimension) if reduced else positions)
        return _WITH_VALUES[func]((values.squeeze(dimension) if reduced else values, positions))


def _dimension(func: Any, rest: list[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the dimension of the choice; topk has a number before it."""
    place = 1 if func in (torch.topk, torch.Tensor.topk) else 0
    return int(kwargs.get("dim", rest[place] if len(rest) > place else -1))
