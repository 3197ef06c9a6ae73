"""The streams of a refinement: they train each unit of the emulator on inputs and outputs of the original's unit.

Held in addition to a unit: the inputs and outputs of its calls, on the host or in mapped files, until its factors are
trained. A pass that goes back too holds the inputs of all units there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.codes.forms import trained_code_values
from onelayer.compiler.emulators.facts import StackFacts
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter, return_free_memory
from onelayer.compiler.models.experts import ExpertStacks, stacks_below
from onelayer.compiler.models.linears import head_workspace, unit_linears
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import RESERVE_BYTES, code_training_bytes, training_bytes
from onelayer.compiler.models.units import Unit
from onelayer.compiler.refine.calls import Call
from onelayer.compiler.refine.reconstruction import refine_unit
from onelayer.compiler.refine.resume import RefinedUnit, RefineWork
from onelayer.compiler.refine.settings import ResolvedRefineSettings
from onelayer.compiler.refine.trained_experts import Trained, TrainedExperts, coded_leaves, stored_of
from onelayer.compiler.refine.trained_linears import trained_linear
from onelayer.compiler.streaming.calibration_stream import CalibrationStream
from onelayer.compiler.streaming.denoising_loss import PassBatch
from onelayer.compiler.streaming.gradient_stream import Record
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Batch, ParkedBatch, Stream
from onelayer.compiler.streaming.unit_boundary import UnitInputs, call_with_containers, fill_containers, with_contents
from onelayer.compiler.streaming.unit_loads import UnitLoads


@dataclass
class UnitTraining:
    """The training of units whose calls are known: of those that `work` does not have yet, in the emulator's form."""

    streamed: StreamedModel
    emulator: Emulator
    work: RefineWork
    settings: ResolvedRefineSettings
    meter: Meter
    stop: StopRequest
    loads: UnitLoads

    def is_wanted(self, unit: Unit) -> bool:
        """Whether a unit has something to train and is not finished."""
        linears, experts = linears_of(unit, self.emulator), experts_of(unit, self.emulator)
        return not self.work.has(unit) and bool(linears or experts)

    def linears(self, unit: Unit, emulator: Emulator) -> dict[str, Trained]:
        """Read what replaces a unit's linears and coded experts in an emulator, by path below the unit."""
        form, found = (self.streamed.dtype, self.meter.device), dict[str, Trained]()
        for name in linears_of(unit, emulator):
            found[name.removeprefix(f"{unit.name}.")] = trained_linear(emulator, name, *form)
        for stacks in experts_of(unit, emulator):
            found[stacks.name.removeprefix(f"{unit.name}.")] = TrainedExperts(emulator, stacks, *form)
        return found

    def train(self, unit: Unit, calls: list[Call]) -> None:
        """Train a resident unit on its calls, if there are any, and write its factors."""
        if processes().any(bool(calls)):
            self._train(unit, calls)
        self.stop.check()

    def _train(self, unit: Unit, calls: list[Call]) -> None:
        linears, team = self.linears(unit, self.emulator), processes()
        before, after = refine_unit(unit, linears, calls, self.settings, self.meter, team, self._promised_bytes())
        figures = RefinedUnit(
            name=unit.name,
            before=before.outputs,
            after=after.outputs,
            gradients_before=before.gradients,
            gradients_after=after.gradients,
            dropped_rows=sum(team.gather(sum(call.dropped_rows for call in calls))),
        )

        def finish() -> None:
            stored = {} if after is before else stored_of(linears)
            self.work.finish(unit, {f"{unit.name}.{end}": tensor for end, tensor in stored.items()}, figures)

        team.by_first(finish)
        self.work.take_up(unit)
        self.meter.note = f"error {before.outputs:.3f} to {after.outputs:.3f}"
        return_free_memory()

    def _promised_bytes(self) -> int:
        """Bound what a device holds for the units so far, without the reserve for libraries."""
        workspace = refine_workspace(
            self.streamed, self.emulator, self.loads, self.meter.on_gpu, backward=self.settings.backward
        )
        return self.streamed.largest_unit_bytes + workspace - RESERVE_BYTES


class RefinePass(Stream):
    """A pass over the original that trains the factors of every unit on what runs through it."""

    def __init__(self, training: UnitTraining, spill_pool: SpillPool) -> None:
        meter = training.meter
        super().__init__(
            training.streamed,
            meter.device,
            meter,
            on_unit=self.watching,
            spill_pool=spill_pool,
            description="refine",
            team=processes(),
            loads=training.loads,
        )
        self.training = training
        self._calls: list[Call] | None = None  # of the running unit; None if it is not to be trained
        self._known: dict[int, WeakTensorKeyDictionary] = {}
        self._samples: list[int] = []  # in each batch

    def refine(self, batches: Sequence[PassBatch]) -> None:
        """Stream the original up to the last unit that is not trained yet, and train each unit on the way."""
        batches = [batches[index] for index in self.team.share(len(batches))]
        self._samples = [batch.shape[0] for batch in batches]
        wanted = [unit.position for unit in self.streamed.units if self.training.is_wanted(unit)]
        if wanted:
            self.stop_after = max(wanted)
            self.run(self.passing([batch.inputs for batch in batches]), lambda index, output: None)

    def passing(self, batches: list[Batch]) -> list[Batch]:
        """Return what runs through the model for these batches."""
        return batches

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run the resident unit for one visit; if it is to be trained, keep its inputs and outputs."""
        inputs = with_contents((visit.args, visit.kwargs))
        kept = None if self._calls is None else self.learned_inputs(visit, inputs)
        if self._calls is None or kept is None:
            return super().run_unit(visit, run)
        here = self.transfers.upload(inputs)
        outputs = self.transfers.download(call_with_containers(partial(run, visit.index), *here))
        call = Call.of(self._samples[visit.index], kept, outputs)
        self.spill_pool.hold((kept.tensors, call.targets))
        self._calls.append(call)
        return fill_containers(inputs[0], outputs)

    def learned_inputs(self, visit: ParkedBatch, inputs: Any) -> UnitInputs | None:
        """Return the inputs for which a unit learns to give the outputs of this visit; None if it does not learn it."""
        return self.kept(visit.index, inputs)

    def kept(self, index: int, inputs: Any) -> UnitInputs:
        """Keep inputs of a batch; tensors that several units read are kept once."""
        return UnitInputs.of(inputs, self._known.setdefault(index, WeakTensorKeyDictionary()))

    @contextmanager
    def watching(self, unit: Unit) -> Iterator[None]:
        """Train a unit's factors after all batches have run through it."""
        self._calls = [] if self.training.is_wanted(unit) else None
        try:
            yield
            self.train_now(unit)
        finally:
            self._calls = None

    def train_now(self, unit: Unit) -> None:
        """Train the resident unit on the calls so far, if it is to be trained and is not trained yet."""
        if self._calls is not None:
            calls, self._calls = self._calls, None
            self.training.train(unit, calls)


class GradientRefinePass(CalibrationStream):
    """A pass forward and back over the original that trains every unit on what runs through it and what comes back.

    Units are trained on the way back, from the last to the first, on the original's inputs, outputs and gradients.
    """

    def __init__(self, training: UnitTraining, batches: Sequence[PassBatch], spill_pool: SpillPool) -> None:
        meter = training.meter
        wanted = {unit.position for unit in training.streamed.units if training.is_wanted(unit)}
        super().__init__(
            training.streamed,
            meter.device,
            meter,
            on_unit=self._stopping,
            spill_pool=spill_pool,
            description="refine",
            seed=training.settings.seed,
            dropout=False,
            loads=training.loads,
            first_wanted=min(wanted, default=0),
        )
        self.training, self.batches, self._wanted = training, batches, wanted
        self._taken: list[Call] | None = None

    def refine(self) -> None:
        """Stream forward with the loss, then back to the first unit that is not trained yet."""
        if self._wanted:
            self.both_ways(self.batches, self._on_unit)

    def watch_rerun(self, unit: Unit, record: Record, outputs: list[torch.Tensor]) -> None:
        """Keep a call of a unit that is to be trained: its inputs, its outputs and their gradients."""
        if self._taken is not None:
            targets = self.transfers.download([output.detach() for output in outputs])
            samples = self.batches[record.index].shape[0]
            call = Call.of(samples, record.kept, targets, record.slots, record.asked)
            self.spill_pool.hold((call.targets, call.gradients))
            self._taken.append(call)

    @contextmanager
    def _stopping(self, unit: Unit) -> Iterator[None]:
        """Stop after a unit if that was asked for: nothing is written on the way forward."""
        yield
        self.training.stop.check()

    @contextmanager
    def _on_unit(self, unit: Unit) -> Iterator[None]:
        """Train a unit's factors after the gradients of all batches have passed it."""
        self._taken = [] if unit.position in self._wanted else None
        yield
        calls, self._taken = self._taken, None
        if calls is not None:
            self.training.train(unit, calls[::-1])


def linears_of(unit: Unit, emulator: Emulator) -> list[str]:
    """List the linears below a unit that the emulator compresses, by runtime module name."""
    return [name for name, _ in unit_linears(unit) if name in emulator.facts.compressed and name != unit.name]


def experts_of(unit: Unit, emulator: Emulator) -> list[ExpertStacks]:
    """List the modules of experts below a unit of which the emulator holds stacks as codes."""
    return [stacks for stacks in stacks_below(unit.name, unit.module) if coded_leaves(emulator, stacks)]


def refine_workspace(
    streamed: StreamedModel, emulator: Emulator, loads: UnitLoads, on_gpu: bool, *, backward: bool
) -> int:
    """Predict what a refinement holds in addition to the largest unit, from shapes alone.

    That is the unit's factors with their gradients and optimizer, copies of the widest factor while it is rounded, the
    gradient of the widest coded weight, the graph of one batch as in an exact step, and a reserve. If the host is also
    the device, the unit that is read ahead counts too. With `backward`, also the second graph and the weights in it, or
    slices of the head.
    """
    worst = head_workspace(streamed, loads.most_rows) if backward else 0
    for unit in streamed.units:
        names = linears_of(unit, emulator)
        values = [_trained_values(emulator, name) for name in names]
        coded = [math.prod(emulator.shape(name)) for name in names if name in emulator.facts.codes]
        decoded = sum(coded)
        for stack in (
            stacks.path(leaf) for stacks in experts_of(unit, emulator) for leaf in coded_leaves(emulator, stacks)
        ):
            count, *shape = emulator.facts.stacks[stack].shape
            values.append(_trained_stack_values(emulator.facts.stacks[stack]))
            coded.append(math.prod(shape))
            decoded += count * coded[-1]
        computed = loads.values(streamed, unit) if values else 0
        twice = sum(values) + decoded if backward else 0
        training = training_bytes(values, computed, streamed.dtype.itemsize, on_gpu, twice)
        training += code_training_bytes(max(coded, default=0))
        worst = max(worst, training + (0 if on_gpu else unit.weight_bytes))
    return worst + RESERVE_BYTES


def _trained_values(emulator: Emulator, name: str) -> int:
    """Count the trained values of one linear: of codes, the codebook, the scales and the residual factors."""
    code = emulator.facts.code_shape(name)
    if code is None:
        return emulator.kept_values(name)
    return trained_code_values(*emulator.shape(name), code.width, emulator.facts.ranks.get(name, 0))


def _trained_stack_values(stack: StackFacts) -> int:
    """Count the trained values of all experts of a coded stack."""
    count, out_features, in_features = stack.shape
    assert stack.code_width is not None
    return count * trained_code_values(out_features, in_features, stack.code_width, stack.rank or 0)
