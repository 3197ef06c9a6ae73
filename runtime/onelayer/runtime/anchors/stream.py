"""Offsets of some batches: the original streams over them, and its emulator's units run on the same inputs.

In: batches, the original with the adapter, the emulator's modules. Out: the offsets of each batch by unit. Held on the
device in addition to the emulator: one unit of the original and its workspace. Offsets wait on the host, and beyond its
budget in mapped files.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.offsets import CodedOffset, code_offset
from onelayer.compiler.machine.console import Shown
from onelayer.compiler.streaming.stream import Batch, ParkedBatch, Stream
from onelayer.compiler.streaming.unit_boundary import UnitInputs, call_with_containers, fill_containers, with_contents
from onelayer.runtime.anchors.hidden_states import hidden_states
from onelayer.runtime.anchors.hooks import Offsets

HOST = torch.device("cpu")


@dataclass
class OffsetStream(Stream):
    """A stream of the original that compares each unit in `emulated`, by name, with the emulator's module for it.

    `precision()` is entered around what runs on the device, as training does. `bar` shows progress instead of a bar of
    the stream's own.
    """

    emulated: Mapping[str, nn.Module] = field(default_factory=dict)
    bits: int = 2
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    bar: Shown | None = None
    _offsets: list[dict[str, dict[int, CodedOffset]]] = field(default_factory=list)

    def find(self, batches: Sequence[Batch]) -> Sequence[Offsets]:
        """Return the offsets of every batch by unit. Raises `InputError` if a unit runs twice for one batch."""
        self._offsets = [{} for _ in batches]
        positions = [unit.position for unit in self.streamed.units if unit.name in self.emulated]
        self.stop_after = max(positions)
        self.run(batches, lambda index, output: None)
        found, self._offsets = self._offsets, []
        return found

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run the original's unit, and the emulator's on the same inputs; keep what the first has more."""
        name = visit.unit.name
        if name not in self.emulated:
            with self.precision():
                return super().run_unit(visit, run)
        if name in self._offsets[visit.index]:
            raise InputError(f"{name}: runs more than once for a batch; train without anchors")
        module = self.emulated[name]
        inputs = with_contents((visit.args, visit.kwargs))
        here = self.transfers.upload(inputs)
        unchanged = UnitInputs.of(here, WeakTensorKeyDictionary())
        with self.precision():
            emulated = call_with_containers(lambda args, kwargs: module(*args, **kwargs), *here)
            unchanged.check_unchanged()
            outputs = call_with_containers(partial(run, visit.index), *here)
        self._offsets[visit.index][name] = self._difference(name, outputs[0], emulated[0])
        return fill_containers(inputs[0], self.transfers.download(outputs))

    def _difference(self, name: str, wanted: Any, found: Any) -> dict[int, CodedOffset]:
        """Return the offsets of a unit's outputs. After the first, those without a difference have none."""
        states, offsets = hidden_states(name, found), dict[int, CodedOffset]()
        for number, state in hidden_states(name, wanted).items():
            offset = state.float() - states[number].float()
            if not offsets or bool(offset.any()):
                offsets[number] = code_offset(offset, self.bits).to(HOST)
                self.spill_pool.hold(offsets[number].tensors)
        return offsets

    def progress(self) -> Any:
        """Return the bar of the whole work, or else one of this pass."""
        return super().progress() if self.bar is None else nullcontext(self.bar)
