"""Lockstep: many batches run through the model's own forward, while each unit is loaded once and only one is held.

Every batch runs in its own greenlet. A unit's forward is a stub that parks the batch with its arguments. When all
batches are parked, one unit is loaded, run for every batch parked at it, and dropped. Units where
only batches with the most inputs wait come first, then module order decides: images finish their own units before
text enters the shared ones.
The code between units is the model's own and runs on the host, which holds parked hidden states. Only units run on the
device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.utils._pytree import tree_leaves

from onelayer.compiler.data.batches import BatchInputs
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.meter import FreedMemory, Meter, return_free_memory
from onelayer.compiler.machine.transfers import Transfers
from onelayer.compiler.models.lazy_tensors import OutsideTableError
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit, hidden_forwards
from onelayer.compiler.streaming.recorded_outputs import Recorded, asked_outputs, hand_over, recording
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.unit_loader import UnitLoader
from onelayer.compiler.streaming.unit_loads import UnitLoads

Batch = Mapping[str, Any]


@dataclass
class ParkedBatch:
    """One batch parked at one unit: the arguments of the call, and whether the calling code records gradients.

    `asked` is what the model was asked to return from inside its units.
    """

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_enabled: bool
    asked: Recorded | None = None
    index: int = -1
    resume: greenlet | None = None


class BatchError(RuntimeError):
    """A failure of one batch inside a unit or between units; names the unit and keeps the cause."""


@dataclass
class Stream:
    """One pass over the checkpoint.

    `on_unit(unit)` is a context manager that is entered when the unit's weights are held and left when all batches have
    run. It yields a callable that runs the unit for one batch instead of the plain call, or None. Batches parked at the
    same unit run in the order of `priority(index)`, lowest first. `call` is what batches run through: the model, unless
    given. The processes of `team` stream the same units, each for batches of its own.
    """

    streamed: StreamedModel
    device: torch.device
    meter: Meter
    on_unit: Callable[[Unit], Any] | None = None
    spill_pool: SpillPool = field(default_factory=SpillPool)
    stop_after: int | None = None
    priority: Callable[[int], Any] = int
    description: str = "stream"
    call: Callable[..., Any] | None = None
    team: Processes = field(default_factory=Processes)
    visits: int = 0  # of units, by all processes together
    loads: UnitLoads = field(default_factory=UnitLoads)  # of this process's batches

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.device)

    def run(self, batches: Sequence[Batch], consume: Callable[[int, Any], None]) -> None:
        """Run `call(**batch)` for every batch; `consume(index, output)` gets each output as soon as it exists.

        With `stop_after`, the pass ends when every unit up to that position has run and every batch is past it; batches
        that were stopped deliver no outputs. Raises `BatchError` from the first failure; no batch is left hanging.
        """
        parked: list[ParkedBatch] = []
        last, freed = self.stop_after, FreedMemory()
        ahead = {unit for unit in self.streamed.units if last is not None and unit.position <= last}
        inputs = [len(batch) for batch in batches]

        def advance(worker: greenlet, index: int, value: Any, grad_enabled: bool) -> None:
            """Let one batch run until it parks again or ends."""
            with self._name_failure(index, None), self.batch_context(index), torch.set_grad_enabled(grad_enabled):
                result = worker.switch(value)
            if worker.dead:
                consume(index, result)
            else:
                result.index, result.resume = index, worker
                self.spill_pool.hold((result.args, result.kwargs))
                parked.append(result)

        with (
            torch.no_grad(),
            self.streamed.between_units(),
            self._stubs(),
            self.loading() as loader,
            self.progress() as bar,
        ):
            try:
                for index, batch in enumerate(batches):
                    worker = greenlet(self._through)
                    advance(worker, index, batch, self.records_gradients(index))
                while (unit := self._agreed(parked, inputs)) is not None:
                    waiting = any(last is None or visit.unit.position <= last for visit in parked)
                    if not ahead and not self.team.any(waiting):
                        break
                    ahead.discard(unit)
                    self._visit(unit, parked, loader, advance)
                    freed.after_unit(self.spill_pool.held_bytes)
                    bar.reached(unit.position + 1, unit.name, self.meter.sample(), self.meter.note)
            finally:
                for visit in parked:
                    assert visit.resume is not None
                    visit.resume.throw()  # GreenletExit: unwinds the model's frames, returns here
        return_free_memory()

    def _agreed(self, parked: Sequence[ParkedBatch], inputs: Sequence[int]) -> Unit | None:
        """Choose the unit that runs next in every process; None if no batch of any is parked."""
        keys = [key for key in self.team.gather(_next_key(parked, inputs)) if key is not None]
        return self.streamed.units[min(keys)[1]] if keys else None

    def _through(self, batch: Batch) -> Any:
        """Run one batch through the model. Raises `InputError` if its rows are longer than a table of positions.

        No configuration field gives the longest row: rotary positions have no end. An index outside a table that is no
        token of the batch is a position. Models that count positions from 2 have two fewer positions than rows.
        """
        batch = self._made(batch)
        try:
            return (self.call or self.streamed.model)(**batch)
        except OutsideTableError as error:
            tensors = [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, torch.Tensor)]
            ids = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
            length = max((tensor.shape[1] for tensor in ids), default=0)
            limit = min(error.rows, error.rows - error.index + length - 1)
            if limit < 2 or any(error.index == int(tensor.max()) for tensor in ids):
                raise
            raise InputError(
                f"--max-length: an example has {length} tokens, and the model's table of positions ends after {limit} "
                f"({error.rows} rows); give --max-length {limit}"
            ) from error

    def _made(self, batch: Batch) -> Mapping[str, Any]:
        """Return the arguments of a batch; those that are made now wait where parked states do."""
        if not isinstance(batch, BatchInputs):
            return batch
        arguments = batch.tensors()
        self.spill_pool.hold(arguments)
        return arguments

    def _visit(
        self,
        unit: Unit,
        parked: list[ParkedBatch],
        loader: UnitLoader,
        advance: Callable[[greenlet, int, Any, bool], None],
    ) -> None:
        """Load a unit, run it for the batches parked at it, return the outputs to them, drop the unit."""
        self.visits += 1
        with loader.hold(unit):
            loader.read_ahead(self._next_of_same_kind(unit))
            with _watch(self.on_unit, unit) as run:
                # A batch that calls the same layer again (shared layers) parks here at once; the unit stays resident.
                while here := [visit for visit in parked if visit.unit is unit]:
                    visit, *later = nsmallest(2, here, key=lambda visit: self.priority(visit.index))
                    assert visit.resume is not None
                    self.before_call(visit, here)
                    self.transfers.expect([(other.args, other.kwargs) for other in later])
                    with self._name_failure(visit.index, unit), self.batch_context(visit.index):
                        output = self.run_unit(visit, run)
                        self.loads.note(unit, (visit.args, visit.kwargs), output)
                        visit.args, visit.kwargs = (), {}
                    self.meter.sample()
                    parked.remove(visit)
                    advance(visit.resume, visit.index, output, visit.grad_enabled)

    def _next_of_same_kind(self, unit: Unit) -> Unit | None:
        """Return the next unit if it is of the same kind: a block of another kind may never be visited."""
        following = self.streamed.units[unit.position + 1 : unit.position + 2]
        return following[0] if following and type(following[0].module) is type(unit.module) else None

    # ---- what a pass that keeps more than outputs overrides --------------------------------------------------------

    def before_call(self, visit: ParkedBatch, here: Sequence[ParkedBatch]) -> None:
        """Prepare the call of the resident unit for one of the batches parked at it, which are `here`."""

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run the resident unit for one parked batch; return its output on the host."""
        args, kwargs = self.transfers.upload((visit.args, visit.kwargs))
        with recording(visit.asked) as recorded:
            output, recorded = self.transfers.download((run(visit.index, args, kwargs), recorded))
        hand_over(recorded, visit.asked)
        return output

    def records_gradients(self, index: int) -> bool:
        """Whether autograd records the code between units for a batch."""
        return False

    def batch_context(self, index: int) -> AbstractContextManager[Any]:
        """Return a context manager that surrounds all code of one batch."""
        return nullcontext()

    def loading(self) -> AbstractContextManager[UnitLoader]:
        """Return the loader of the units' weights for the pass."""
        return UnitLoader(self.streamed, self.device)

    def progress(self) -> AbstractContextManager[Progress]:
        """Return the progress bar of the pass."""
        return Progress(len(self.streamed.units) if self.stop_after is None else self.stop_after + 1, self.description)

    @contextmanager
    def _stubs(self) -> Iterator[None]:
        """Replace the forward of every unit by a stub that parks its caller."""

        def stub(unit: Unit) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                scheduler = getcurrent().parent
                assert scheduler is not None, f"{unit.name} was called outside the stream"
                return scheduler.switch(ParkedBatch(unit, args, kwargs, torch.is_grad_enabled(), asked_outputs()))

            return forward

        with hidden_forwards({unit.module: stub(unit) for unit in self.streamed.units}):
            yield

    @contextmanager
    def _name_failure(self, index: int, unit: Unit | None) -> Iterator[None]:
        """Turn an error into a `BatchError` that names the model, the batch and the unit."""
        where = f"unit {unit.name}" if unit else "the code between units"
        try:
            yield
        except (InputError, BatchError, KeyboardInterrupt, torch.OutOfMemoryError):
            raise
        except Exception as error:
            kind = type(self.streamed.model).__name__
            raise BatchError(f"{kind}, batch {index}, {where}: {type(error).__name__}: {error}") from error


def _next_key(parked: Sequence[ParkedBatch], inputs: Sequence[int]) -> tuple[int, int] | None:
    """Return by what a process would choose its next unit, the lowest first, with the unit's position.

    `inputs` counts each batch's inputs; a batch with many will reach units of the others.
    """
    fewest: dict[Unit, int] = {}
    for visit in parked:
        fewest[visit.unit] = min(inputs[visit.index], fewest.get(visit.unit, inputs[visit.index]))
    return min(((-count, unit.position) for unit, count in fewest.items()), default=None)


@contextmanager
def _watch(on_unit: Callable[[Unit], Any] | None, unit: Unit) -> Iterator[Callable[[int, Any, Any], Any]]:
    """Enter `on_unit` and yield the callable that runs the unit for one batch."""

    def run(index: int, args: Any, kwargs: Any) -> Any:
        return unit.forward(*args, **kwargs)

    if on_unit is None:
        yield run
    else:
        with on_unit(unit) as special:
            yield special or run
