"""A streamed unit and the modules and tensors in it."""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onelayer.compiler.libraries.modules import has_forward

Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Unit:
    """A module that is loaded, run for every batch and dropped as one.

    `parameters` are the stored parameters and buffers below it by runtime name. `lazy` are those that stay on disk and
    are read by rows. `is_block` tells a repeated layer or a projector from a norm or a projection.
    """

    name: str
    position: int
    module: nn.Module
    parameters: tuple[str, ...]
    lazy: frozenset[str]
    is_block: bool
    weight_bytes: int

    @property
    def held_names(self) -> list[str]:
        """The runtime names of the parameters that are held while the unit is resident."""
        return [name for name in self.parameters if name not in self.lazy]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code. The instance's `forward` is the stream's stub, which would park the caller."""
        return type(self.module).forward(self.module, *args, **kwargs)


@contextmanager
def hidden_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of some modules on entry, restore them on exit."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            # An instance attribute hides the class's forward from `__call__` and is gone when deleted.
            module.forward = forward
        yield
    finally:
        for module, forward_before in before.items():
            if forward_before is None:
                del module.forward
            else:
                module.forward = forward_before


@contextmanager
def replaced_forwards(unit: Unit, forwards: Mapping[nn.Module, Forward]) -> Iterator[Forward]:
    """Replace the forwards of a unit's modules on entry, restore them on exit; yield the forward of the whole unit."""
    with hidden_forwards({part: forward for part, forward in forwards.items() if part is not unit.module}):
        yield forwards.get(unit.module, unit.forward)


def bare_name(name: str) -> str:
    """Return the name in the unadapted model of a parameter or module that PEFT may have wrapped."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Count the bytes of a tensor's values, on any device, including the meta device."""
    return tensor.numel() * tensor.element_size()


def set_tensor(owner: nn.Module, leaf: str, tensor: Any) -> None:
    """Put a tensor in a module's slot; a stand-in for a tensor does not become an `nn.Parameter`."""
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
        tensor = nn.Parameter(tensor, requires_grad=False)
    owner._parameters[leaf] = tensor


def named_parts(unit: Unit) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a unit with their names in the unadapted model; a wrapped module has its wrapper's name."""
    for name, module in unit.module.named_modules():
        yield bare_name(f"{unit.name}.{name}" if name else unit.name), module


def names_read_by_rows(owners: Mapping[str, tuple[nn.Module, str]], head: nn.Module | None) -> frozenset[str]:
    """Return the names of matrices that are only ever read by rows: embedding tables, and the head.

    `owners` gives the module and attribute of each name.
    """

    def is_table(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and module.max_norm is None

    return frozenset(
        name for name, (owner, leaf) in owners.items() if leaf == "weight" and (is_table(owner) or owner is head)
    )


def split_into_units(
    model: nn.Module,
    blocks: Set[nn.Module],
    head: nn.Module | None,
    stored: Mapping[nn.Module, Mapping[str, int]],
    lazy: frozenset[str],
) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """Split a model into units, in module order; also return the stored names that belong to none.

    `blocks` are the repeated layers; every other module that runs and holds a stored parameter itself is a unit too.
    `stored` gives the runtime names of a module's own stored parameters, with their bytes.
    """
    units: list[Unit] = []
    outside: list[str] = []
    seen: set[nn.Module] = set()

    def is_unit(module: nn.Module) -> bool:
        # PEFT's wrappers decide whose weight is used, so they belong into the unit.
        wraps = any(getattr(module, name, None) is not None for name in ("base_layer", "original_module"))
        runs = any(name not in lazy for name in stored.get(module, ())) and module is not head and has_forward(module)
        return module in blocks or wraps or (runs and blocks.isdisjoint(module.modules()))

    def visit(name: str, module: nn.Module) -> None:
        if module in seen:  # one module registered at several places is one unit
            return
        seen.add(module)
        if is_unit(module):
            sizes = {item: size for part in module.modules() for item, size in stored.get(part, {}).items()}
            held_bytes = sum(size for item, size in sizes.items() if item not in lazy)
            position, own_lazy = len(units), lazy & sizes.keys()
            units.append(Unit(bare_name(name), position, module, tuple(sizes), own_lazy, module in blocks, held_bytes))
            return
        outside.extend(stored.get(module, ()))
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return tuple(units), tuple(outside)
