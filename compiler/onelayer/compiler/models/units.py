"""A streamed unit and the modules and tensors in it."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds the parameter or buffer `name`, and its attribute there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def has_forward(module: torch.nn.Module) -> bool:
    """Whether a module is called at all: lists and other containers only hold what is."""
    return type(module).forward is not torch.nn.Module.forward


@dataclass(frozen=True, eq=False)
class Unit:
    """A module that is loaded, run for every batch and dropped as one.

    `parameters` are the stored parameters and buffers below it by runtime name. `lazy` are those that stay on disk and
    are read by rows. `is_block` tells a repeated layer from a norm or a projection.
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
def replaced_forwards(unit: Unit, forwards: Mapping[nn.Module, Forward]) -> Iterator[Forward]:
    """Replace the forwards of a unit's modules on entry, restore them on exit; yield the forward of the whole unit."""
    inner = [part for part in forwards if part is not unit.module]
    for part in inner:
        # An instance attribute hides the class's forward from `__call__` and is gone when deleted.
        part.forward = forwards[part]
    try:
        yield forwards.get(unit.module, unit.forward)
    finally:
        for part in inner:
            del part.forward


def bare_name(name: str) -> str:
    """The runtime name in the unadapted model of a parameter or module that PEFT may have wrapped."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values, on any device, the meta device included."""
    return tensor.numel() * tensor.element_size()


def set_tensor(owner: nn.Module, leaf: str, tensor: Any) -> None:
    """Put a tensor in a module's slot as it stands; stand-ins for tensors are no `nn.Parameter`."""
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
        tensor = nn.Parameter(tensor, requires_grad=False)
    owner._parameters[leaf] = tensor


def named_parts(unit: Unit) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a unit with their names in the unadapted model; what PEFT wraps has that of its wrapper."""
    for name, module in unit.module.named_modules():
        yield bare_name(f"{unit.name}.{name}" if name else unit.name), module
