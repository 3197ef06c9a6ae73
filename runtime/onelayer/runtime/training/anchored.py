"""Anchored training: batches drawn ahead from the trainer's own loader, and offsets for them before their steps.

Of transformers' semi-private surface this relies on `Trainer.get_batch_samples`, which is called once for each
optimizer step with the iterator of the epoch, on `training_step`, which is then called once for each batch in that
order, and on `_save_checkpoint`.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.console import StopRequest, notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.units import Unit
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.anchors.renewal import Renewal
from onelayer.runtime.anchors.report import AnchorReport
from onelayer.runtime.training.callbacks import Progress, SaveAndStop
from onelayer.runtime.training.checkpoints import checkpoint_step, newest_checkpoint
from onelayer.runtime.training.inputs import TrainModel
from onelayer.runtime.training.settings import TrainSettings


class StoppedAnchoringError(Exception):
    """A stop that was asked for while the original streams."""


class Anchoring:
    """Anchors that are renewed every `every` optimizer steps, and where an epoch begins."""

    def __init__(self, anchors: Anchors, every: int, bar: Progress) -> None:
        self.anchors, self.every, self.bar = anchors, every, bar
        self._drawn: deque[Any] = deque()
        self._renewal: Renewal | None = None
        self._resumed: Renewal | None = None

    def report(self) -> AnchorReport:
        """Return what it has cost so far."""
        return self.anchors.report(self.every)

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint what the offsets that wait were found with."""
        if not self.anchors.is_used_up:
            assert self._renewal is not None
            self._renewal.save(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Begin with the offsets that waited at a checkpoint."""
        self._resumed = Renewal.load(checkpoint)

    def ahead(self, epoch: Iterator[Any], batches_per_step: int, step: int, last: int) -> Iterator[Any]:
        """Return the batches of `epoch` in order. If all that were drawn are used up, draw more and find their offsets.

        No batch is drawn that no step is left for: `step` of `last` are done. Raises `StoppedAnchoringError` if a stop
        was asked for; the random state is then what it was.
        """
        if not self._drawn:
            random_state = torch.get_rng_state()
            renewal, self._resumed = self._resumed or Renewal(step, self.anchors.adapter()), None
            steps = min(renewal.step + self.every, last) - step
            batches = list(islice(epoch, batches_per_step * steps))
            try:
                with self.anchors.using(renewal.adapter):
                    self.anchors.renew(batches, self.bar)
            except StoppedAnchoringError:
                torch.set_rng_state(random_state)
                raise
            self._renewal = renewal
            self._drawn.extend(batches)
        return (self._drawn.popleft() for _ in range(len(self._drawn)))


class AnchoredTrainer(Trainer):
    """A Trainer that can anchor the model for each batch."""

    anchoring: Anchoring | None = None
    bar: Progress

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Collect the batches of one optimizer step, from those that were drawn ahead if the model is anchored."""
        if self.anchoring is not None:
            batches_per_step, state = self.args.gradient_accumulation_steps, self.state
            epoch_iterator = self.anchoring.ahead(epoch_iterator, batches_per_step, state.global_step, state.max_steps)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch, anchored."""
        if self.anchoring is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self.anchoring.anchors.next_batch():
            return super().training_step(model, inputs, *args, **kwargs)

    def save_step(self, work: Path) -> None:
        """Save a checkpoint of the last step that was taken, if there is one and it is not saved in `work`."""
        saved = newest_checkpoint(work)
        if self.state.global_step and (saved is None or checkpoint_step(saved) < self.state.global_step):
            assert self.model is not None
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; into a checkpoint also what the offsets that wait were found with."""
        super().save_model(output_dir, _internal_call)
        if self.anchoring is not None and _internal_call and self.args.should_save:
            assert output_dir is not None
            self.anchoring.save(Path(output_dir))


def anchor(
    trainer: AnchoredTrainer,
    emulator: TrainModel,
    original: Path,
    settings: TrainSettings,
    meter: Meter,
    stop: StopRequest,
) -> Anchoring:
    """Let the trainer anchor its model by the original in a directory, as `settings` say, until a stop is asked for."""
    assert settings.anchor_every is not None

    @contextmanager
    def stopping(unit: Unit) -> Iterator[None]:
        yield
        # Processes stream by themselves, so together they stop after the step.
        if processes().is_alone and stop.is_asked():
            raise StoppedAnchoringError

    adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
    facts = Emulator.open(emulator.directory).facts
    anchors = Anchors(adapted, facts, original, settings.anchor_bits, meter, trainer.accelerator.autocast, stopping)
    trainer.anchoring = Anchoring(anchors, settings.anchor_every, trainer.bar)
    return trainer.anchoring


def train_until_stopped(trainer: AnchoredTrainer, work: Path, checkpoint: Path | None, stop: StopRequest) -> None:
    """Train to the end. A stop saves a checkpoint after the present step and raises `KeyboardInterrupt`."""
    trainer.add_callback(SaveAndStop(stop))
    if trainer.anchoring is not None and checkpoint is not None:
        trainer.anchoring.resume(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except StoppedAnchoringError:
        trainer.save_step(work)
    step, last, saved = trainer.state.global_step, trainer.state.max_steps, newest_checkpoint(work)
    if step < last:
        notice(f"stopped after step {step} of {last}; {saved.name if saved else 'no checkpoint'} is saved")
        stop.check()
