"""Copies between the host and an accelerator that block neither: through pinned memory, ahead of their use.

What the next batch needs is copied on a stream of its own while the device computes the present one. The host waits
once for all outputs of a batch. If the host is the device, nothing is copied.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to memory that a device reads by itself."""
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor on a device. The host does not wait."""
    return tensor if device.type == "cpu" else pinned(tensor.detach()).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Copy:
    """A host tensor on the device, and the versions of both, which tell whether one was changed in place."""

    source: torch.Tensor
    copied: torch.Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, source: torch.Tensor, copied: torch.Tensor) -> "_Copy":
        """Describe a copy that was just made."""
        return cls(source, copied, (source._version, copied._version))

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether the copy still has the values of a tensor."""
        return self.source is tensor and self.versions == (tensor._version, self.copied._version)


class Transfers:
    """The transfers of one pass. Values are trees of tensors; tensors of other classes move in their own way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._expected: Any = ()
        self._ahead: dict[int, _Copy] = {}
        self._kept: dict[int, _Copy] = {}
        self._side_stream: Any = None

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    @property
    def copies(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device.type != "cpu"

    def expect(self, values: Any) -> None:
        """Name the values that are uploaded next; they are copied while the host waits in `download`."""
        self._expected = values

    def upload(self, values: Any) -> Any:
        """Return the values on the device. The host does not wait."""
        if not self.copies:
            return values
        moved: dict[int, torch.Tensor] = {}

        def on_device(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = self._found(tensor) if _is_plain(tensor) else tensor.to(self.device)
            return moved[id(tensor)]

        return tree_map_only(torch.Tensor, on_device, values)

    def download(self, values: Any) -> Any:
        """Return the values on the host, once the device has computed them. What is expected is uploaded before."""
        if not self.copies:
            return values
        arriving = {
            id(tensor): torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tree_leaves(values)
            if _is_plain(tensor) and tensor.device.type != "cpu"
        }
        arrived = self._module.Event()
        arrived.record(self._module.current_stream(self.device))
        self._upload_expected()
        if arriving:
            arrived.synchronize()
        # Pinned memory is scarce: what waits for the next unit waits in ordinary memory.
        here = {key: tensor.clone() for key, tensor in arriving.items()}
        return tree_map_only(torch.Tensor, lambda leaf: here[id(leaf)] if id(leaf) in here else leaf.to("cpu"), values)

    def keep(self, groups: Iterable[Any], room_bytes: int) -> None:
        """Keep trees of values on the device, as many of the first ones as fit, until `forget`."""
        for values in groups if self.copies else ():
            tensors = {id(leaf): leaf for leaf in tree_leaves(values) if _is_plain(leaf) and id(leaf) not in self._kept}
            room_bytes -= sum(tensor.nbytes for tensor in tensors.values())
            if room_bytes < 0:
                return
            self._kept |= {key: _Copy.of(tensor, self._uploaded(tensor)) for key, tensor in tensors.items()}

    def forget(self) -> None:
        """Drop what was kept or uploaded ahead."""
        self._kept, self._ahead, self._expected = {}, {}, ()

    def _found(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor's copy that is kept or was uploaded ahead, or else upload it."""
        if tensor.device.type != "cpu":
            return tensor.to(self.device)
        kept, ahead = self._kept.get(id(tensor)), self._ahead.pop(id(tensor), None)
        if kept is not None and kept.is_of(tensor):
            return kept.copied
        if ahead is not None and ahead.is_of(tensor):
            stream = self._module.current_stream(self.device)
            stream.wait_stream(self._side_stream)
            ahead.copied.record_stream(stream)  # its memory is the side stream's
            return ahead.copied
        return self._uploaded(tensor)

    def _upload_expected(self) -> None:
        expected, self._expected = self._expected, ()
        leaves = {id(leaf): leaf for leaf in tree_leaves(expected) if _is_plain(leaf) and id(leaf) not in self._kept}
        if leaves and self._side_stream is None:
            self._side_stream = self._module.Stream(self.device)
        with self._module.stream(self._side_stream or self._module.current_stream(self.device)):
            self._ahead = {key: _Copy.of(tensor, self._uploaded(tensor)) for key, tensor in leaves.items()}

    def _uploaded(self, tensor: torch.Tensor) -> torch.Tensor:
        return upload(tensor, self.device)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that a copy of its bytes replaces."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


class Arrivals:
    """Tensors on their way from a device to the host, which waits once for all of them.

    A tensor on the device is free as soon as it is copied, so nobody has to hold it until then. What arrives stays in
    pinned memory: keep it no longer than it takes to write it.
    """

    def __init__(self) -> None:
        self._devices: set[torch.device] = set()

    def begin(self, values: Any) -> Any:
        """Return a tree of values with its tensors on the host, where they are of no use before `wait`."""
        return tree_map_only(torch.Tensor, self._begun, values)

    def wait(self) -> None:
        """Wait until everything that was begun is there."""
        while self._devices:
            device = self._devices.pop()
            module: Any = torch.get_device_module(device)
            arrived = module.Event()
            arrived.record(module.current_stream(device))
            arrived.synchronize()

    def _begun(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        self._devices.add(tensor.device)
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors on the host, which waits once for all of them."""
    arrivals = Arrivals()
    arrived: dict[str, torch.Tensor] = arrivals.begin(dict(tensors))
    arrivals.wait()
    return arrived
