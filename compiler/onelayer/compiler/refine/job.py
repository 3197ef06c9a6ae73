"""The stream of a refinement: trains each unit of the emulator on the inputs and outputs of the original's unit.

Held in addition to a unit: the inputs and outputs of its calls, on the host or in mapped files, until its factors are
trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.codes.forms import CODEBOOK_ROWS, group_size
from onelayer.compiler.data.batches import TokenBatch
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.devices import move
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter, return_free_memory
from onelayer.compiler.models.linears import unit_linears, unit_width
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import RESERVE_BYTES, training_bytes
from onelayer.compiler.models.units import Unit
from onelayer.compiler.refine.reconstruction import Call, refine_unit
from onelayer.compiler.refine.resume import RefineWork
from onelayer.compiler.refine.settings import RefineSettings
from onelayer.compiler.refine.trained_linears import trained_linear
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import ParkedBatch, Stream
from onelayer.compiler.streaming.unit_boundary import UnitInputs, call_with_containers, fill_containers, with_contents


class RefinePass(Stream):
    """A pass over the original that trains the factors of every unit of `emulator` and hands them to `work`."""

    def __init__(
        self,
        streamed: StreamedModel,
        emulator: Emulator,
        work: RefineWork,
        settings: RefineSettings,
        meter: Meter,
        spill_pool: SpillPool,
    ) -> None:
        super().__init__(
            streamed,
            meter.device,
            meter,
            on_unit=self._on_unit,
            spill_pool=spill_pool,
            description="refine",
            team=processes(),
        )
        self.emulator, self.work, self.settings = emulator, work, settings
        self.stop: StopRequest | None = None
        self._calls: list[Call] | None = None  # of the running unit; None if it is not to be trained
        self._known: dict[int, WeakTensorKeyDictionary] = {}
        self._samples: list[int] = []  # in each batch

    def refine(self, batches: Sequence[TokenBatch], stop: StopRequest) -> None:
        """Stream the original up to the last unit that is not trained yet, and train each unit on the way."""
        batches = [batches[index] for index in self.team.share(len(batches))]
        self.stop, self._samples = stop, [batch.shape[0] for batch in batches]
        wanted = [unit.position for unit in self.streamed.units if self._is_wanted(unit)]
        if wanted:
            self.stop_after = max(wanted)
            self.run([batch.inputs for batch in batches], lambda index, output: None)

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run the resident unit for one visit; if it is to be trained, keep its inputs and outputs."""
        if self._calls is None:
            return super().run_unit(visit, run)
        inputs = with_contents((visit.args, visit.kwargs))
        kept = UnitInputs.of(inputs, self._known.setdefault(visit.index, WeakTensorKeyDictionary()))
        outputs = move(call_with_containers(partial(run, visit.index), *move(inputs, self.device)), torch.device("cpu"))
        call = Call.of(self._samples[visit.index], kept, outputs)
        self.spill_pool.hold((kept.tensors, call.targets))
        self._calls.append(call)
        return fill_containers(inputs[0], outputs)

    @contextmanager
    def _on_unit(self, unit: Unit) -> Iterator[None]:
        """Train a unit's factors after all batches have run through it."""
        if not self._is_wanted(unit):
            yield
            return
        self._calls = []
        try:
            yield
            calls = self._calls
        finally:
            self._calls = None
        if self.team.any(bool(calls)):
            self._train(unit, calls)
        assert self.stop is not None
        self.stop.check()

    def _train(self, unit: Unit, calls: list[Call]) -> None:
        names = {name.removeprefix(f"{unit.name}."): name for name in linears_of(unit, self.emulator)}
        linears = {
            path: trained_linear(self.emulator, name, self.streamed.dtype, self.device) for path, name in names.items()
        }
        before, after = refine_unit(unit, linears, calls, self.settings, self.meter, self.team)
        dropped_rows = sum(self.team.gather(sum(call.dropped_rows for call in calls)))

        def finish() -> None:
            stored = {
                names[path] + ending: tensor.cpu()
                for path, linear in linears.items()
                for ending, tensor in linear.stored().items()
            }
            self.work.finish(unit, stored if after < before else {}, before, after, dropped_rows)

        self.team.by_first(finish)
        self.work.take_up(unit)
        self.meter.note = f"error {before:.3f} to {after:.3f}"
        return_free_memory()

    def _is_wanted(self, unit: Unit) -> bool:
        return not self.work.has(unit) and bool(linears_of(unit, self.emulator))


def linears_of(unit: Unit, emulator: Emulator) -> list[str]:
    """List the linears below a unit that the emulator compresses, by runtime module name."""
    return [name for name, _ in unit_linears(unit) if name in emulator.facts.compressed and name != unit.name]


def refine_workspace(streamed: StreamedModel, emulator: Emulator, batch_tokens: int, on_gpu: bool) -> int:
    """Predict what a refinement holds in addition to the largest unit, from shapes alone.

    That is the unit's factors with their gradients and optimizer, copies of the widest factor while it is rounded, the
    graph of one batch as in an exact step, and a reserve. If the host is also the device, the unit that is read ahead
    counts too.
    """
    worst = 0
    for unit in streamed.units:
        names = linears_of(unit, emulator)
        values = [_trained_values(emulator, name) for name in names]
        width = unit_width(streamed, unit) if names else 0
        training = training_bytes(values, width, batch_tokens, streamed.dtype.itemsize, on_gpu)
        worst = max(worst, training + unit.weight_bytes)
    return worst + RESERVE_BYTES


def _trained_values(emulator: Emulator, name: str) -> int:
    """Count the trained values of one linear: of codes, the codebook, the scales and the residual factors."""
    width = emulator.facts.codes.get(name)
    if width is None:
        return emulator.kept_values(name)
    out_features, in_features = emulator.shape(name)
    factors = emulator.facts.ranks.get(name, 0) * (out_features + in_features)
    return factors + CODEBOOK_ROWS * width + out_features * -(-in_features // group_size(in_features))
