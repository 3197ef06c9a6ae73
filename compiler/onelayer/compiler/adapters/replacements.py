"""What adapters change outside PEFT's wrappers: an adapter and a bare model in, new values by parameter out.

These are modules saved whole, biases, saved embeddings and single token rows. They are put in place while a unit is
resident and PEFT's own wrappers are left out, so that adapters of different kinds stand next to each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit, tensor_bytes

# Two tensors are compared by so many values at a time.
COMPARED_VALUES = 1 << 20


@dataclass(frozen=True)
class Replacement:
    """New values of one parameter: the tensor `key` of an adapter's file, for all of it or for some `rows`."""

    source: Adapter
    key: str
    rows: tuple[int, ...] | None = None

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """Return the values that replace `base`, in its dtype and on its device."""
        values = self.source.read(self.key).to(base)
        if self.rows is None:
            return values
        changed = base.detach().clone()
        changed[list(self.rows)] = values
        return changed

    def equals(self, other: "Replacement") -> bool:
        """Whether another replacement gives the same values."""
        if self.rows != other.rows or self.key == other.key:
            return self.rows == other.rows
        shape = self.source.tensors[self.key].shape
        if shape != self.source.tensors[other.key].shape:
            return False
        if not shape:
            return torch.equal(self.source.read(self.key), self.source.read(other.key))
        step = max(1, COMPARED_VALUES // math.prod(shape[1:]))
        spans = ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return all(
            torch.equal(self.source.read_rows(self.key, *span), self.source.read_rows(other.key, *span))
            for span in spans
        )


# By runtime name of the parameter in the bare model.
Replacements = Mapping[str, Replacement]


def replacements_of(adapter: Adapter, bare: StreamedModel) -> Replacements:
    """Return what an adapter replaces in a bare model, as PEFT does it.

    A parameter of the base that PEFT changed in place changes everywhere it is tied to; a copy of a module changes
    nothing else. Rows of the input embedding go to all that is tied to it, unless some of that has rows of its own.
    """
    tied: dict[str, Replacement] = {}
    own: dict[str, Replacement] = {}
    for parameter, key in adapter.dense.items():
        own[parameter] = Replacement(adapter, key)
        if parameter not in adapter.copies:
            tied |= dict.fromkeys(bare.weights.tied_with(parameter), own[parameter])
    for module, (key, rows) in adapter.token_rows.items():
        parameter = f"{module}.weight"
        if parameter in own:
            raise InputError(
                f"{adapter.directory}: holds {parameter} whole and single rows of it; save the adapter with one of them"
            )
        own[parameter] = Replacement(adapter, key, tuple(rows))
        others = bare.weights.tied_with(parameter)
        alone = all(f"{other}.weight" not in others for other in adapter.token_rows)
        if alone and _is_tied_input(bare, module):
            tied |= dict.fromkeys(others, own[parameter])
    return {**tied, **own}


def _is_tied_input(bare: StreamedModel, module: str) -> bool:
    """Whether a module is the input embedding of a model whose configuration ties embeddings; PEFT looks only there."""
    is_input = bare.model.get_submodule(module) is bare.model.get_input_embeddings()
    return is_input and bool(getattr(bare.config, "tie_word_embeddings", False))


@contextmanager
def replaced_values(
    streamed: StreamedModel, unit: Unit, replacements: Mapping[str, Replacements]
) -> Iterator[Callable[[str | None], None]]:
    """Hold what adapters replace in a resident unit; yield the function that puts the values of one, or the base's.

    `replacements` are those of every adapter by its name.
    """
    names = {name for each in replacements.values() for name in each}.intersection(unit.parameters)
    base = {name: tensor for name, tensor in streamed.tensors_of(unit).items() if name in names}
    held = {
        adapter: base | {name: each[name].of(base[name]) for name in names & each.keys()}
        for adapter, each in replacements.items()
    }
    present: str | None = None

    def switch(adapter: str | None) -> None:
        nonlocal present
        if adapter != present:
            present = adapter
            for name, tensor in (base if adapter is None else held[adapter]).items():
                streamed.put(name, tensor)

    try:
        yield switch
    finally:
        switch(None)


def replaced_bytes(streamed: StreamedModel, replacements: Mapping[str, Replacements]) -> int:
    """Count what the unit with most replaced values holds of them, for all adapters."""

    def held(unit: Unit) -> int:
        names = (name for each in replacements.values() for name in each.keys() & set(unit.parameters))
        return sum(tensor_bytes(streamed.weights.bare_parameters[name]) for name in names)

    return max((held(unit) for unit in streamed.units), default=0)
