"""The weights of a checkpoint by runtime name: which stored tensors make a parameter, read and converted on the host.

In: a checkpoint and its model class. Out: parameters in the compute dtype. Held: headers and an empty model; weights
only while they are converted.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch

from onelayer.compiler.libraries.construction import modules_limit
from onelayer.compiler.libraries.library import Library
from onelayer.compiler.libraries.modules import owner_of
from onelayer.compiler.models.units import set_tensor
from onelayer.compiler.storage.checkpoint import Checkpoint


class StoredWeights:
    """The parameters and buffers that a checkpoint makes, by runtime name.

    `limit` is the number of modules that its model class may have.
    """

    def __init__(self, library: Library, checkpoint: Checkpoint, config: Any, cls: Any, dtype: torch.dtype) -> None:
        self.library, self.checkpoint = library, checkpoint
        self.dtype = dtype
        # Loading rules use the names of the bare model, so an untouched twin receives what is loaded.
        self.limit = modules_limit(len(checkpoint.tensors))
        self._twin = library.build_skeleton(config, cls, dtype, limit=self.limit)
        # Empty (meta) parameters and buffers, which give the shape and dtype of each runtime name.
        self.bare_parameters: dict[str, torch.Tensor] = dict(self._twin.state_dict(keep_vars=True))
        self._conversion = library.converter(self._twin, dtype)
        self._plan = library.plan_loading(self._twin, checkpoint)
        self._made_from: dict[str, list[str]] = {}
        for name, keys in self._plan.checkpoint_keys.items():
            for key in keys:
                self._made_from.setdefault(key, []).append(name)
        self.computed = library.computed_parameters(self._twin, self._plan, checkpoint.directory)
        self._made_in: dict[str, torch.dtype] = {}  # what the library made of parameters that are stored unchanged

    @cached_property
    def checkpoint_keys(self) -> dict[str, tuple[str, ...]]:
        """The checkpoint keys of each stored runtime name. A tied name that is not stored has those of its partner."""
        keys = self._plan.checkpoint_keys
        return {**keys, **{name: keys[source] for name, source in self._plan.alias.items()}}

    @property
    def aliases(self) -> frozenset[str]:
        """Tied runtime names that the checkpoint stores under their partner's name only."""
        return frozenset(self._plan.alias)

    @property
    def stored_unchanged(self) -> frozenset[str]:
        """Runtime names that are one stored tensor, at most renamed; no operation makes them."""
        return self._plan.stored_unchanged

    def tied_with(self, name: str) -> frozenset[str]:
        """Return the other runtime names that are the same parameter in the model."""
        return self.library.tied_with(self._twin, name)

    def reads_rows(self, name: str) -> bool:
        """Whether rows of a parameter, or of the partner it is tied to, can be read without the rest of it."""
        name = self._plan.alias.get(name, name)
        return name in self._plan.stored_unchanged and self.checkpoint.reads_rows(self._plan.checkpoint_keys[name][0])

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Count the bytes of the checkpoint tensors of some runtime names."""
        keys = {key for name in names for key in self.checkpoint_keys[name]}
        return sum(self.checkpoint.tensors[key].size_bytes for key in keys)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read the checkpoint tensors of some runtime names, as stored, to the host."""
        wanted = dict.fromkeys(key for name in names for key in self.checkpoint_keys[name])
        return {key: self.checkpoint.read(key) for key in wanted}

    def convert(self, names: Iterable[str], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make parameters by runtime name from their checkpoint tensors, on the host, in the compute dtype.

        The library converts and checks them the first time. Of parameters that are stored unchanged their dtype is all
        that it decides: an exact step needs every unit twice, and asking again took two percent of its time.
        """
        names = tuple(names)
        if self._made_in.keys() >= set(names):
            return {name: stored[self.checkpoint_keys[name][0]].to(self._made_in[name]) for name in names}
        try:
            self._conversion.convert(stored)
            parameters = {}
            for name in names:
                owner, leaf = owner_of(self._twin, self._plan.alias.get(name, name))
                parameters[name] = getattr(owner, leaf).detach()
        finally:
            self._empty_twin(stored)
        for name, tensor in parameters.items():
            assert tensor.device.type != "meta", f"{name} was not loaded from {self.checkpoint_keys[name]}"
            if self._plan.alias.get(name, name) in self._plan.stored_unchanged:
                self._made_in[name] = tensor.dtype
        return parameters

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read and convert some parameters by runtime name, on the host."""
        names = tuple(names)
        return self.convert(names, self.read(names))

    def on_device(
        self, names: Iterable[str], stored: dict[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Convert checkpoint tensors and move them to `device`; never hold all of them in both places."""
        tensors = self.convert(names, stored)
        stored.clear()
        return {name: tensors.pop(name).to(device, non_blocking=True) for name in tuple(tensors)}

    def _empty_twin(self, stored: Iterable[str]) -> None:
        for name in {name for key in stored for name in self._made_from[key]}:
            set_tensor(*owner_of(self._twin, name), self.bare_parameters[name])
