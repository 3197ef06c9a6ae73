"""How much the units of a stream compute at once: rows and values, as they are called.

Units of one model may see different rows: those of a vision tower compute patches, those of a decoder the tokens of the
text. Nothing but the call itself says how many, so each call is noted.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from onelayer.compiler.models.linears import unit_width
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit


class UnitLoads:
    """The most rows that each unit saw in one call, and the most values that it was given and returned."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._states: dict[int, int] = {}

    def note(self, unit: Unit, arguments: Any, output: Any) -> None:
        """Note one call. Rows are counted in tensors (N, n) and (B, N, n), states of an encoder included."""
        given = _floats(arguments)
        rows = max((tensor.numel() // tensor.shape[-1] for tensor in given if tensor.ndim in (2, 3)), default=0)
        states = sum(tensor.numel() for found in (given, _floats(output)) for tensor in found[:1])
        self._rows[unit.position] = max(self._rows.get(unit.position, 0), rows)
        self._states[unit.position] = max(self._states.get(unit.position, 0), states)

    def rows(self, unit: Unit) -> int:
        """Return the most rows that a unit saw in one call."""
        return self._rows.get(unit.position, 0)

    def values(self, streamed: StreamedModel, unit: Unit) -> int:
        """Count what all matrices of a unit read and give in its largest call; a convolution's are what it is given."""
        return max(self.rows(unit) * unit_width(streamed, unit), self._states.get(unit.position, 0))

    def most_values(self, streamed: StreamedModel) -> int:
        """Count what all matrices of one unit read and give, of the unit that has the most."""
        return max(self.values(streamed, unit) for unit in streamed.units)

    @property
    def most_rows(self) -> int:
        """The most rows that any unit saw in one call."""
        return max(self._rows.values(), default=0)

    @property
    def most_states(self) -> int:
        """The most values that a batch hands from one unit to the next, with those that the next returns."""
        return max(self._states.values(), default=0)


def _floats(tree: Any) -> list[torch.Tensor]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel() and tensor.ndim > 1]
