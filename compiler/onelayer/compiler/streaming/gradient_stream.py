"""Exact gradients of small trained parameters, with one unit of the model in memory: one pass forward, one back.

Forward, every batch runs through the model as in `Stream`. Each unit's inputs are kept (on the host, above the budget
in mapped files), its inside is not. Back, units run in reverse order. Each unit runs again for every call, now with a
graph of its inside, which turns the gradients of its outputs into those of its inputs and trained parameters. Every
unit is loaded twice, except the unit at the turn, which is loaded once.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.factors.activation_factors import Compressed, compress
from onelayer.compiler.machine.console import Shown
from onelayer.compiler.machine.devices import forked_random, random_state, seed_random
from onelayer.compiler.machine.meter import FreedMemory, return_free_memory
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.recorded_outputs import Recorded, hand_over, recording
from onelayer.compiler.streaming.stream import Batch, ParkedBatch, Stream
from onelayer.compiler.streaming.unit_boundary import (
    Slots,
    UnitInputs,
    call_with_containers,
    cut_graph,
    fill_containers,
    rerun,
    with_contents,
)
from onelayer.compiler.streaming.unit_loader import UnitLoader

HOST = torch.device("cpu")


@dataclass
class Record:
    """One call of a unit: its inputs, the slots for its outputs' gradients, and the seed of its random numbers."""

    index: int
    seed: int
    kept: UnitInputs
    slots: Slots
    asked: Recorded | None


@dataclass
class GradientStream(Stream):
    """Two passes over the checkpoint: `run` forward, then `reverse`. One `with` block serves many such pairs.

    Batches from number `trained` on are only scored: they leave no records and run in evaluation mode. `seed` fixes
    dropout and other noise: each call of a unit has its own seed, so that a rerun gives the same result. With `rank` (a
    number, or a share of the features), unit inputs are kept as factors of that rank plus a residual of two bits a
    value. Gradients are then approximate; the forward pass stays exact. Without `dropout`, trained batches run in
    evaluation mode too. On the way back, `on_unit` may yield a callable that runs the unit for one call. With a
    `loader`, which outlives the stream, no `with` block is needed. `is_random` tells whether random numbers were drawn.
    """

    trained: int = 0
    seed: int = 0
    rank: int | float | None = None
    dropout: bool = True
    bar: Shown | None = None
    loader: UnitLoader | None = None
    is_random: bool = False
    places: Sequence[int] = ()  # the numbers of the batches among those of all processes
    _records: list[tuple[int, Unit, list[Record]]] = field(default_factory=list)  # by the number of the visit
    _known: dict[int, WeakTensorKeyDictionary] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> "GradientStream":
        self.loader = UnitLoader(self.streamed, self.device, keep=True).__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.loader is not None
        self.forget()
        self.loader.__exit__(*exception)

    def forget(self) -> None:
        """Drop everything that a forward pass kept."""
        self._records.clear()
        self._known.clear()
        self._calls.clear()

    def run(self, batches: Sequence[Batch], consume: Callable[[int, Any], None]) -> None:
        """Run the forward pass. `consume` may call backward on the output of a trained batch, at once or later."""
        self.forget()
        self._known = {index: WeakTensorKeyDictionary() for index in range(self.trained)}
        super().run(batches, consume)
        self._known.clear()
        assert self.loader is not None
        self.loader.forget_ahead()

    def reverse(self) -> None:
        """Run the pass back: add the gradients of all trained batches to `.grad` of every trained parameter."""
        assert self.loader is not None
        freed = FreedMemory()
        with torch.no_grad(), self.progress() as bar:
            while (latest := self._latest_visit()) is not None:
                visit, position = latest
                unit, records = self.streamed.units[position], list[Record]()
                if self._records and self._records[-1][0] == visit:
                    records = self._records.pop()[2]
                with self.loader.hold(unit):
                    self.loader.read_ahead(self._records[-1][1] if self._records else None)
                    with nullcontext() if self.on_unit is None else self.on_unit(unit) as run:
                        self._reverse_unit(unit, records, run)
                freed.after_unit(self.spill_pool.held_bytes)
                bar.reached(2 * len(self.streamed.units) - unit.position, unit.name, self.meter.sample())
        self.forget()
        return_free_memory()

    def _latest_visit(self) -> tuple[int, int] | None:
        """Return the number of the latest visit that any process has to go back through, and its unit's position."""
        mine = (self._records[-1][0], self._records[-1][1].position) if self._records else None
        return max((latest for latest in self.team.gather(mine) if latest is not None), default=None)

    def _reverse_unit(self, unit: Unit, records: list[Record], run: Callable[..., Any] | None) -> None:
        while records:
            record = records.pop()
            self.transfers.expect([before.kept.arguments for before in records[-1:]])
            if any(slot is not None for slot in record.slots):
                with (
                    self._name_failure(record.index, unit),
                    self._random(record.seed),
                    training(self.streamed.model, self.dropout),
                ):
                    self._reverse_call(unit, record, run)
            self.meter.sample()

    def _reverse_call(self, unit: Unit, record: Record, run: Callable[..., Any] | None) -> None:
        record.kept.check_unchanged()
        forward = None if run is None else lambda *args, **kwargs: run(record.index, args, kwargs)
        with torch.enable_grad():
            outputs, leaves = rerun(unit, record.kept, self.transfers, forward, record.asked)
        self.watch_rerun(unit, record, outputs)
        pairs = [
            (output, slot)
            for output, slot in zip(outputs, self.transfers.upload(record.slots), strict=True)
            if slot is not None and output.requires_grad
        ]
        record.slots.clear()
        if pairs:
            outputs, gradients = map(list, zip(*pairs, strict=True))
            torch.autograd.backward(outputs, gradients)
            record.kept.send_gradients(leaves, self.transfers)

    # ---- what the forward pass overrides ---------------------------------------------------------------------------

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run a unit without a graph of its inside; keep its inputs and cut the graph at its outputs."""
        if visit.index >= self.trained:
            return super().run_unit(visit, run)
        seed = self._next_seed(visit.index)
        shrink = None if self.rank is None else partial(self._shrunk, seed)
        inputs = with_contents((visit.args, visit.kwargs))
        kept = UnitInputs.of(inputs, self._known[visit.index], shrink)
        self.spill_pool.hold(kept.tensors)
        with self._random(seed), recording(visit.asked) as recorded:
            here = self.transfers.upload(inputs)
            outputs = self.transfers.download((call_with_containers(partial(run, visit.index), *here), recorded))
        if visit.grad_enabled and (kept.wants_gradients or self.wants_gradients(visit.unit)):
            outputs, slots = cut_graph(outputs, self.spill_pool.hold)
            if not self._records or self._records[-1][0] != self.visits:
                self._records.append((self.visits, visit.unit, []))
            self._records[-1][2].append(Record(visit.index, seed, kept, slots, visit.asked))
        hand_over(outputs[1], visit.asked)
        return fill_containers(inputs[0], outputs[0])

    def _shrunk(self, seed: int, tensor: torch.Tensor) -> Compressed:
        assert self.rank is not None
        rank = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * tensor.shape[-1]))
        return compress(tensor, rank, torch.Generator().manual_seed(seed))

    def wants_gradients(self, unit: Unit) -> bool:
        """Whether a unit needs gradients of its own; the way back ends at the first one that does."""
        return any(parameter.requires_grad for parameter in unit.module.parameters())

    def watch_rerun(self, unit: Unit, record: Record, outputs: list[torch.Tensor]) -> None:
        """Take what a unit gives when it runs again; `record.slots` hold the gradients of the outputs."""

    def records_gradients(self, index: int) -> bool:
        """Whether autograd records the code between units: for the batches that are trained on."""
        return index < self.trained

    @contextmanager
    def batch_context(self, index: int) -> Iterator[None]:
        """Set training mode for a trained batch, and random numbers of its own; the pool holds what its graph keeps."""
        is_trained = index < self.trained
        numbers = self._random(self._next_seed(index)) if is_trained else nullcontext()
        with (
            training(self.streamed.model, is_trained and self.dropout),
            numbers,
            saved_tensors_hooks(self._kept, _same),
        ):
            yield

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        self.spill_pool.hold(tensor)
        return tensor

    def loading(self) -> Any:
        """Return one loader for all passes, so that the unit at which a pass ends is held when the next begins."""
        assert self.loader is not None
        return nullcontext(self.loader)

    def progress(self) -> Any:
        """Return the bar of the whole work, or else one of this pass."""
        return super().progress() if self.bar is None else nullcontext(self.bar)

    def _next_seed(self, index: int) -> int:
        """Return the seed of a batch's next piece of code, the same in every run with the same `seed`."""
        self._calls[index] = self._calls.get(index, 0) + 1
        place = self.places[index] if self.places else index
        digest = hashlib.sha256(f"{self.seed} {place} {self._calls[index]}".encode()).digest()
        return int.from_bytes(digest[:7])

    @contextmanager
    def _random(self, seed: int) -> Iterator[None]:
        """Draw random numbers from a seed; restore the caller's generators on exit."""
        with forked_random(self.device):
            seed_random(self.device, seed)
            before = random_state(self.device)
            yield
            self.is_random |= not all(map(torch.equal, before, random_state(self.device)))


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def training(model: nn.Module, mode: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode, unless it is in that mode already.

    Layers that learn from every batch in training mode (batch norms) do not change: the original is not trained.
    """
    if model.training != mode:
        model.train(mode)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    yield
