"""A pass forward over the calibration data to the loss, and back to the first unit whose gradients are wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onelayer.compiler.machine.console import Progress
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.denoising_loss import PassBatch, loss_of
from onelayer.compiler.streaming.gradient_stream import GradientStream


@dataclass
class CalibrationStream(GradientStream):
    """A stream whose gradients end at the unit at position `first_wanted`."""

    first_wanted: int = 0

    def wants_gradients(self, unit: Unit) -> bool:
        """Whether gradients are wanted of a unit or of one before it."""
        return unit.is_block and unit.position >= self.first_wanted

    def both_ways(self, batches: Sequence[PassBatch], on_way_back: Callable[[Unit], Any]) -> None:
        """Run all batches to the loss, then back; `on_way_back` watches the units of the way back.

        Each process of the team runs its share. Raises `RuntimeError` if the loss is not finite.
        """
        loss = loss_of(batches, len(batches), self.device, self.team, self.spill_pool)
        self.trained, self.places = loss.trained, loss.places
        with Progress(2 * len(self.streamed.units), self.description) as bar, self:
            self.bar = bar
            self.run(loss.inputs, loss.take)
            if not loss.finish():
                raise RuntimeError("the loss on the calibration data is not finite; check the checkpoint and the data")
            self.on_unit = on_way_back
            self.reverse()
