"""A model without weights, cut into the units that are streamed: which tensors each needs, and how it gets them.

In: a model directory. Out: the real model class on the meta device, its units in module order, and loading of one
unit at a time. Held: headers and module objects; weights only inside `resident`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from onelayer.compiler.models import transformers_models
from onelayer.compiler.models.lazy_tensors import AbsentWeight, DiskMatrix
from onelayer.compiler.models.units import Unit, bare_name, has_forward, owner_of, set_tensor, tensor_bytes
from onelayer.compiler.storage.checkpoint import Checkpoint


class StreamedModel:
    """A checkpoint and the model class it belongs to, without its weights.

    `model` is what runs: its own code, on the host, its parameters on the meta device until their unit is resident.
    `checkpoint_keys` maps each runtime parameter name to the checkpoint keys that make it.
    """

    def __init__(self, directory: str | Path, prepare: Callable[[PreTrainedModel], None] | None = None) -> None:
        """Open `directory`; `prepare` may wrap modules of the empty model (adapters) before it is cut into units.

        Raises `InputError` where the checkpoint or the architecture cannot be streamed, naming what and why.
        """
        self.checkpoint = Checkpoint.open(directory)
        self.config = transformers_models.read_config(self.checkpoint.directory)
        cls = transformers_models.model_class(self.config, self.checkpoint.directory)
        self.dtype = transformers_models.compute_dtype(self.config, self.checkpoint)
        # Loading rules go by the names of the bare model, so an untouched twin receives what is loaded.
        self._twin = transformers_models.build_skeleton(self.config, cls, self.dtype)
        self._empty: dict[str, torch.Tensor] = dict(self._twin.state_dict(keep_vars=True))
        self._plan = transformers_models.plan_loading(self._twin, self.checkpoint)
        computed = transformers_models.computed_parameters(self._twin, self._plan, self.checkpoint.directory)
        self.model = transformers_models.build_skeleton(self.config, cls, self.dtype, computed)
        if prepare is not None:
            self._wrap(prepare)
        found = {name: bare_name(name) for name in self.model.state_dict()}
        self._owners = {bare: owner_of(self.model, name) for name, bare in found.items() if bare in self._empty}
        self._absent: dict[str, torch.Tensor] = {
            name: AbsentWeight.like(empty, name, lambda name: self.convert([name], self.read([name]))[name])
            for name, empty in self._empty.items()
            if empty.is_meta
        }
        for name in self._owners.keys() & self._absent.keys() - computed:
            set_tensor(*self._owners[name], self._absent[name])
        # What an adapter wraps it may want whole, so only untouched matrices are left on disk.
        self._wrapped = {bare for name, bare in found.items() if bare != name}
        self.head = self._find_head()
        self.units = self._cut()

    def _wrap(self, prepare: Callable[[PreTrainedModel], None]) -> None:
        """Let `prepare` see parameters that lie on the host, without storage: it puts its own where it finds these."""
        places = [owner_of(self.model, name) for name in self._empty]
        found = [(*place, getattr(*place)) for place in places if getattr(*place).is_meta]  # the others are computed
        for owner, leaf, empty in found:
            set_tensor(owner, leaf, torch.empty((), dtype=empty.dtype).expand(empty.shape))
        prepare(self.model)
        for owner, leaf, empty in found:
            set_tensor(owner, leaf, empty)

    @property
    def checkpoint_keys(self) -> dict[str, tuple[str, ...]]:
        """The checkpoint keys behind each stored runtime name; a tied name without its own goes by its partner's."""
        keys = self._plan.checkpoint_keys
        return {**keys, **{name: keys[source] for name, source in self._plan.alias.items()}}

    @property
    def stored_unchanged(self) -> frozenset[str]:
        """Runtime names that are one stored tensor, at most renamed; no operation makes them."""
        return self._plan.stored_unchanged

    @property
    def largest_unit_bytes(self) -> int:
        """Weights of the largest unit, as they are held when it runs."""
        return max(unit.weight_bytes for unit in self.units)

    @property
    def aliases(self) -> frozenset[str]:
        """Tied runtime names that the checkpoint stores under their partner's name only."""
        return frozenset(self._plan.alias)

    @property
    def parameters_outside_units(self) -> tuple[str, ...]:
        """Stored parameters outside every unit: embeddings and the head, which stay on disk, and a few small ones."""
        return tuple(self._resident)

    def tensors_of(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The tensors of a unit that is resident now, by runtime name; lazy ones as the stand-ins they are."""
        return {name: getattr(*self._owners[name]) for name in unit.parameters}

    def bare_parameter(self, name: str) -> torch.Tensor:
        """The empty (meta) parameter of a runtime name: its shape and dtype."""
        return self._empty[name]

    # ---- cutting --------------------------------------------------------------------------------------------------

    def _find_head(self) -> nn.Module | None:
        """The module that turns hidden states into logits, where it is a plain linear of its own."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        return head if type(head) is nn.Linear else None

    def _cut(self) -> tuple[Unit, ...]:
        names_below: dict[nn.Module, list[str]] = {}
        for name, (owner, _) in self._owners.items():
            names_below.setdefault(owner, []).append(name)
        lazy = self._lazy = self._lazy_names()

        def unit(name: str, module: nn.Module, is_block: bool) -> Unit:
            below = tuple(
                item for part in module.modules() for item in names_below.get(part, ()) if self._is_stored(item)
            )
            held = sum(tensor_bytes(self._empty[item]) for item in below if item not in lazy)
            return Unit(bare_name(name), len(units), module, below, lazy & frozenset(below), is_block, held)

        def walk(name: str, module: nn.Module) -> None:
            if module in seen:  # one module registered at several places is one unit
                return
            seen.add(module)
            is_block = module in blocks
            own = any(self._is_stored(item) and item not in lazy for item in names_below.get(module, ()))
            own = own and module is not self.head and has_forward(module)
            # PEFT's wrappers decide whose weight is used, so they belong into the unit.
            wrapped = any(getattr(module, name, None) is not None for name in ("base_layer", "original_module"))
            if is_block or wrapped or (own and blocks.isdisjoint(module.modules())):
                units.append(unit(name, module, is_block))
                return
            self._resident.extend(item for item in names_below.get(module, ()) if self._is_stored(item))
            for child_name, child in module.named_children():
                walk(f"{name}.{child_name}" if name else child_name, child)

        blocks = transformers_models.block_modules(self.model)
        seen: set[nn.Module] = set()
        units: list[Unit] = []
        self._resident: list[str] = []
        walk("", self.model)
        return tuple(units)

    def _is_stored(self, name: str) -> bool:
        return name in self._plan.checkpoint_keys or name in self._plan.alias

    def _lazy_names(self) -> frozenset[str]:
        """Matrices that are only ever read by rows: embedding tables, and the head."""
        lazy = set()
        for name, (owner, leaf) in self._owners.items():
            source = self._plan.alias.get(name, name)
            table = isinstance(owner, nn.Embedding) and owner.max_norm is None
            if (
                leaf == "weight"
                and source in self._plan.stored_unchanged
                and name not in self._wrapped
                and (table or owner is self.head)
            ):
                lazy.add(name)
        return frozenset(lazy)

    # ---- loading --------------------------------------------------------------------------------------------------

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The checkpoint tensors behind some runtime names, as stored, on the host."""
        keys = self.checkpoint_keys
        wanted = dict.fromkeys(key for name in names for key in keys[name])
        return {key: self.checkpoint.read(key) for key in wanted}

    def convert(self, names: Iterable[str], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of some runtime names from their checkpoint tensors, on the host, in the compute dtype."""
        names = tuple(names)
        try:
            transformers_models.convert(self._twin, stored, self.dtype)
            found = {}
            for name in names:
                owner, leaf = owner_of(self._twin, self._plan.alias.get(name, name))
                found[name] = getattr(owner, leaf).detach()
        finally:
            self._empty_twin(stored)
        for name, tensor in found.items():
            assert tensor.device.type != "meta", f"{name} was not loaded from {self.checkpoint_keys[name]}"
        return found

    def _empty_twin(self, stored: Iterable[str]) -> None:
        loaded = set(stored)
        for name, keys in self._plan.checkpoint_keys.items():
            if not loaded.isdisjoint(keys):
                set_tensor(*owner_of(self._twin, name), self._empty[name])

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Some parameters by runtime name, read and converted, on the host; meant to be dropped on exit."""
        names = tuple(names)
        yield self.convert(names, self.read(names))

    def on_device(
        self, names: Iterable[str], stored: dict[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Parameters from their checkpoint tensors, converted, on `device`; never all of them in both places."""
        tensors = self.convert(names, stored)
        stored.clear()
        return {name: tensors.pop(name).to(device) for name in tuple(tensors)}

    @contextmanager
    def resident(
        self, unit: Unit, device: torch.device, tensors: dict[str, torch.Tensor] | None = None
    ) -> Iterator[None]:
        """Hold one unit's weights on `device`; on exit it is empty again. `tensors` may have been loaded before."""
        if tensors is None:
            tensors = self.on_device(unit.held_names, self.read(unit.held_names), device)
        buffers = dict(unit.module.named_buffers())
        try:
            for name, buffer in buffers.items():
                set_tensor(*owner_of(unit.module, name), buffer.to(device))
            for parameter in unit.module.parameters():
                # An adapter's, or computed: it is small and stays there. Stand-ins for tensors are no `nn.Parameter`.
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

    def matrix(self, name: str, device: torch.device) -> DiskMatrix:
        """A lazy parameter as a stand-in that reads its rows from disk."""
        (key,) = self.checkpoint_keys[name]
        is_head = self._owners[name][0] is self.head
        return DiskMatrix.over(self.checkpoint, key, self._empty[name].dtype, device, is_head)

    @contextmanager
    def between_units(self) -> Iterator[None]:
        """Give the code between units what it reads, on the host: small parameters, and matrices that stay on disk."""
        small = [name for name in self.parameters_outside_units if name not in self._lazy]
        tensors = self.convert(small, self.read(small))
        try:
            for name in self._lazy:
                set_tensor(*self._owners[name], self.matrix(name, torch.device("cpu")))
            for name, tensor in tensors.items():
                set_tensor(*self._owners[name], tensor)
            yield
        finally:
            for name in (*tensors, *self._lazy):
                set_tensor(*self._owners[name], self._without(name))

    def _without(self, name: str) -> torch.Tensor:
        """What lies in a parameter's place while it is not held; buffers go back to their first values."""
        return self._absent.get(name, self._empty[name])

    @property
    def lazy(self) -> frozenset[str]:
        """Runtime names of the matrices that stay on disk and are read by rows."""
        return self._lazy
