"""Loads one unit after another: holds the weights of one unit and reads those of the next ahead.

In: the order in which units are needed. Out: units whose weights are on the device while they are held. The device
holds one unit. The host holds one more, as stored, while it is read ahead, and keeps those that fit a given memory. For
a device of its own the host's lie in pinned memory, so that no upload blocks.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from onelayer.compiler.machine.transfers import pinned
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit

Tensors = dict[str, torch.Tensor]


class UnitLoader:
    """Loads units for some passes. With `keep`, the last unit's weights stay for the next request, which may be for it.

    The last units that fit `cache_bytes` together are read once and stay in host memory, as stored: they are needed at
    the end of a pass forward and at the beginning of the pass back, so that it is read less by their bytes both times.
    """

    def __init__(self, streamed: StreamedModel, device: torch.device, keep: bool = False, cache_bytes: int = 0) -> None:
        self.streamed = streamed
        self.device = device
        self.keep = keep
        self._cached: dict[Unit, Tensors | None] = dict.fromkeys(_last_units(streamed, cache_bytes))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._pending: tuple[Unit, Future[Tensors]] | None = None
        self._kept: tuple[Unit, Tensors] | None = None

    def __enter__(self) -> "UnitLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept = self._pending = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def hold(self, unit: Unit) -> Iterator[None]:
        """Hold the unit's weights on the device; empty the unit on exit."""
        tensors = self._take(unit)
        with self.streamed.resident(unit, self.device, tensors):
            yield
        if self.keep:
            self._kept = (unit, tensors)

    def read_ahead(self, unit: Unit | None) -> None:
        """Start to read a unit that is probably needed next."""
        if unit is not None and self._pending is None and not self._is_kept(unit):
            self._pending = (unit, self._pool.submit(self._read, unit))

    def forget_ahead(self) -> None:
        """Drop what was read ahead and not requested; otherwise nothing more would be read ahead."""
        if self._pending is not None:
            self._pending[1].cancel()
            self._pending = None

    def _is_kept(self, unit: Unit) -> bool:
        return self._kept is not None and self._kept[0] is unit

    def _take(self, unit: Unit) -> Tensors:
        """Return a unit's weights on the device: kept, read ahead or read now; raise an error of the reading thread."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is unit:
            return kept[1]
        kept = None  # the device holds one unit: the old one goes before the new one comes
        if self._pending is not None and self._pending[0] is unit:
            future, self._pending = self._pending[1], None
            stored = future.result()
        else:
            stored = self._read(unit)
        return self.streamed.weights.on_device(unit.held_names, stored, self.device)

    def _read(self, unit: Unit) -> Tensors:
        """Return a unit's stored tensors, from the file or from memory."""
        stored = self._cached.get(unit)
        if stored is None:
            stored = self.streamed.weights.read(unit.held_names)
            if self.device.type != "cpu":
                stored = {key: pinned(stored.pop(key)) for key in tuple(stored)}
            if unit in self._cached:
                self._cached[unit] = stored
        return dict(stored)  # who gets it drops tensor by tensor


def _last_units(streamed: StreamedModel, cache_bytes: int) -> list[Unit]:
    """Return as many of the last units as have `cache_bytes` together, as stored."""
    units, left = [], cache_bytes
    for unit in reversed(streamed.units):
        left -= streamed.weights.stored_bytes(unit.held_names)
        if left < 0:
            break
        units.append(unit)
    return units
