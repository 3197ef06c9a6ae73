"""A refinement on the emulator's own inputs: every batch runs twice, through the original and through the emulator.

A unit of the emulator gets inputs that the units before it, refined already, have made. It is trained to give what the
original's unit gives for the original's inputs, so it also learns to make up for their errors, as in sequential
reconstruction (BRECQ, arXiv 2102.05426; GPTQ, arXiv 2210.17323). Held in addition to a refinement on the original's
inputs: the parked states of the second run, on the host or in mapped files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from onelayer.compiler.models.units import Unit
from onelayer.compiler.refine.distances import replaced_linears
from onelayer.compiler.refine.job import RefinePass, UnitTraining
from onelayer.compiler.refine.trained_experts import Trained
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Batch, ParkedBatch
from onelayer.compiler.streaming.unit_boundary import UnitInputs, with_contents


class OwnInputsPass(RefinePass):
    """A refinement whose batches each have a twin, which runs through the emulator refined so far.

    The twin of batch i of n has the number i + n, so all batches run through a unit before any twin does; the unit is
    trained in between. If a model calls a unit several times in a row, the first calls train it. Experts that are
    not codes are left unchanged, and in both runs they are the original's.
    """

    def __init__(self, training: UnitTraining, spill_pool: SpillPool) -> None:
        super().__init__(training, spill_pool)
        # Of the running unit, by the number of the twin; None once a call has taken them.
        self._own: dict[int, UnitInputs | None] = {}
        self._linears: Mapping[str, Trained] | None = None  # of the running unit, once it is trained

    def passing(self, batches: list[Batch]) -> list[Batch]:
        """Return what runs through the model: the batches, then their twins."""
        return [*batches, *batches]

    def before_call(self, visit: ParkedBatch, here: Sequence[ParkedBatch]) -> None:
        """Keep the twin's inputs before the first call of a batch; train the unit before the first call of a twin."""
        if self._is_twin(visit):
            self.train_now(visit.unit)
            if self._linears is None:
                self._linears = self.training.linears(visit.unit, self.training.work.refined)
            return
        number = visit.index + len(self._samples)
        twin = next((other for other in here if other.index == number), None)
        if self._calls is not None and twin is not None and number not in self._own:
            self._own[number] = self.kept(number, with_contents((twin.args, twin.kwargs)))

    def learned_inputs(self, visit: ParkedBatch, inputs: Any) -> UnitInputs | None:
        """Return the twin's inputs, for the first call of a batch."""
        number = visit.index + len(self._samples)
        kept, self._own[number] = self._own.get(number), None
        return kept

    def run_unit(self, visit: ParkedBatch, run: Callable[[int, Any, Any], Any]) -> Any:
        """Run the resident unit with the original's weights, or with the emulator's for a twin."""
        with replaced_linears(visit.unit, self._linears or {} if self._is_twin(visit) else {}):
            return super().run_unit(visit, run)

    def _is_twin(self, visit: ParkedBatch) -> bool:
        return visit.index >= len(self._samples)

    @contextmanager
    def watching(self, unit: Unit) -> Iterator[None]:
        """Train a unit between batches and twins; forget its inputs and linears afterwards."""
        with super().watching(unit):
            yield
        self._own, self._linears = {}, None
