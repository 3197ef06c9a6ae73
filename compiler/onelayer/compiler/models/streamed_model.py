"""A model without weights, split into the units that are streamed: which tensors each needs, and how it gets them.

In: a model directory. Out: the real model class on the meta device, its units in module order, and the weights of one
unit at a time. Held: headers and module objects; weights only inside `resident`.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.modules import owner_of
from onelayer.compiler.machine.primitives import primitive_bytes
from onelayer.compiler.models.lazy_tensors import AbsentWeight, DiskMatrix
from onelayer.compiler.models.original import Original
from onelayer.compiler.models.stored_weights import StoredWeights
from onelayer.compiler.models.units import (
    Unit,
    bare_name,
    names_read_by_rows,
    set_tensor,
    split_into_units,
    tensor_bytes,
)


class StreamedModel:
    """A checkpoint and the model class it belongs to, without its weights.

    `model` is what runs: its own code, on the host, its parameters on the meta device until their unit is resident.
    `weights` are the checkpoint's. `units` are in module order; `parameters_outside_units` are stored parameters in
    none of them: embeddings and the head, which stay on disk, and a few small ones. `lazy` are the runtime names of
    the matrices that stay on disk and are read by rows.
    """

    def __init__(
        self,
        directory: str | Path,
        prepare: Callable[[Any], None] | None = None,
        replaced: Collection[str] = (),
    ) -> None:
        """Open `directory`; `prepare` may wrap modules of the empty model (adapters) before it is split into units.

        `replaced` are the runtime names of parameters that get other values while their unit is resident, so each of
        them is held in a unit. Raises `InputError` where the checkpoint or the architecture cannot be streamed, naming
        what and why.
        """
        original = Original.open(directory)
        self.library, self.config = original.library, original.config
        self.dtype, self.checkpoint = original.dtype, original.checkpoint
        cls = original.model_class
        weights = self.weights = StoredWeights(self.library, self.checkpoint, self.config, cls, self.dtype)
        self.model = self.library.build_skeleton(self.config, cls, self.dtype, weights.computed, weights.limit)
        if prepare is not None:
            self._wrap(prepare)
        self._absent: dict[str, torch.Tensor] = {
            name: AbsentWeight.like(empty, name, self._refuse if name in replaced else self._load_one)
            for name, empty in weights.bare_parameters.items()
            if empty.is_meta
        }
        self._is_open = False
        self.arrange(replaced)
        for name in sorted(set(replaced).intersection(self.parameters_outside_units)):
            self._refuse(name)

    def arrange(self, replaced: Collection[str] = ()) -> None:
        """Empty the model and split it into units; again after an adapter wrapped some of its modules."""
        bare_names = {name: bare_name(name) for name in self.model.state_dict(keep_vars=True)}
        stored = self.weights.bare_parameters
        self._owners = {bare: owner_of(self.model, name) for name, bare in bare_names.items() if bare in stored}
        for name in self._owners.keys() & self._absent.keys() - self.weights.computed:
            set_tensor(*self._owners[name], self._absent[name])
        self.head = self._find_head(replaced)
        # An adapter may need the whole of what it wraps or replaces, so only untouched matrices stay on disk.
        touched = {bare for name, bare in bare_names.items() if bare != name}.union(replaced)
        alone = [name for name in self._owners.keys() - touched if self.weights.reads_rows(name)]
        self.lazy = names_read_by_rows({name: self._owners[name] for name in alone}, self.head)
        self.units, self.parameters_outside_units = self._split()

    def _wrap(self, prepare: Callable[[Any], None]) -> None:
        """Let `prepare` see parameters on the host, without storage, so that it puts its own parameters there too."""
        owners = [owner_of(self.model, name) for name in self.weights.bare_parameters]
        empty = [(*owner, getattr(*owner)) for owner in owners if getattr(*owner).is_meta]  # the others are computed
        for module, leaf, tensor in empty:
            set_tensor(module, leaf, torch.empty((), dtype=tensor.dtype).expand(tensor.shape))
        prepare(self.model)
        for module, leaf, tensor in empty:
            set_tensor(module, leaf, tensor)

    def _load_one(self, name: str) -> torch.Tensor:
        return self.weights.load([name])[name]

    def _refuse(self, name: str) -> torch.Tensor:
        raise InputError(
            f"{self.checkpoint.directory}: {name} is read by the code between layers, so an adapter that replaces it "
            "cannot be streamed; merge the adapter, and use the merged model"
        )

    def _find_head(self, replaced: Collection[str]) -> nn.Module | None:
        """The module that turns hidden states into logits, where it is a plain linear whose values stay."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        stays = all(owner is not head for owner, _ in (self._owners[name] for name in replaced))
        return head if type(head) is nn.Linear and stays else None

    def _split(self) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
        stored: dict[nn.Module, dict[str, int]] = {}
        for name, (owner, _) in self._owners.items():
            if name in self.weights.checkpoint_keys:
                stored.setdefault(owner, {})[name] = tensor_bytes(self.weights.bare_parameters[name])
        return split_into_units(self.model, self.library.block_modules(self.model), self.head, stored, self.lazy)

    @property
    def largest_unit_bytes(self) -> int:
        """Weights of the largest unit, as they are held when it runs."""
        return max(unit.weight_bytes for unit in self.units)

    def host_bytes(self, on_gpu: bool) -> int:
        """Count what a host that computes holds in addition to a unit and the pass: unpacking a weight, and kernels."""
        unpacking = 0 if on_gpu else self.checkpoint.unpacking_bytes
        return unpacking + primitive_bytes(self.dtype.itemsize, on_gpu)

    def tensors_of(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The tensors of a unit that is resident now, by runtime name; stand-ins for those that are lazy."""
        return {name: getattr(*self._owners[name]) for name in unit.parameters}

    @contextmanager
    def resident(
        self, unit: Unit, device: torch.device, tensors: dict[str, torch.Tensor] | None = None
    ) -> Iterator[None]:
        """Hold one unit's weights on `device`; empty it on exit. `tensors` may have been loaded before."""
        if tensors is None:
            tensors = self.weights.on_device(unit.held_names, self.weights.read(unit.held_names), device)
        buffers = dict(unit.module.named_buffers())
        try:
            for name, buffer in buffers.items():
                set_tensor(*owner_of(unit.module, name), buffer.to(device))
            for parameter in unit.module.parameters():
                # A parameter that an adapter adds or the model computes is small and stays on the device. Stand-ins
                # for tensors are no `nn.Parameter`.
                if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.device != device:
                    parameter.data = parameter.data.to(device)
            for name in unit.parameters:
                set_tensor(*self._owners[name], tensors[name] if name in tensors else self.matrix(name, device))
            yield
        finally:
            for name in unit.parameters:
                lazy = self.matrix(name, torch.device("cpu")) if name in unit.lazy else None
                set_tensor(*self._owners[name], self._without(name) if lazy is None else lazy)
            for name, buffer in buffers.items():
                set_tensor(*owner_of(unit.module, name), buffer)

    def stored_owners(self) -> set[tuple[nn.Module, str]]:
        """Return module and attribute of everything that is the checkpoint's, and not an adapter's."""
        return set(self._owners.values())

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Put other values in the place of a parameter of the unit that is resident; they go with the unit."""
        set_tensor(*self._owners[name], tensor)

    def matrix(self, name: str, device: torch.device) -> DiskMatrix:
        """Return a stand-in for a lazy parameter that reads its rows from disk."""
        (key,) = self.weights.checkpoint_keys[name]
        is_head = self._owners[name][0] is self.head
        return DiskMatrix.over(self.checkpoint, key, self.weights.bare_parameters[name].dtype, device, is_head)

    def place_head(self, device: torch.device) -> None:
        """Give a head that stays on disk what it reads, on `device`, for code that runs outside of a stream."""
        for name, (owner, _) in self._owners.items():
            if owner is self.head and name in self.lazy:
                self.put(name, self.matrix(name, device))
            elif owner is self.head and name in self.parameters_outside_units:
                self.put(name, self.weights.load([name])[name].to(device))

    @contextmanager
    def between_units(self) -> Iterator[None]:
        """Give the code between units what it reads, on the host: small parameters, and matrices that stay on disk.

        It may be entered again inside.
        """
        if self._is_open:
            yield
            return
        tensors = self.weights.load(name for name in self.parameters_outside_units if name not in self.lazy)
        self._is_open = True
        try:
            for name in self.lazy:
                set_tensor(*self._owners[name], self.matrix(name, torch.device("cpu")))
            for name, tensor in tensors.items():
                set_tensor(*self._owners[name], tensor)
            yield
        finally:
            self._is_open = False
            for name in (*tensors, *self.lazy):
                set_tensor(*self._owners[name], self._without(name))

    def _without(self, name: str) -> torch.Tensor:
        """The stand-in for a parameter that is not held, or the first value of a buffer."""
        return self._absent.get(name, self.weights.bare_parameters[name])
