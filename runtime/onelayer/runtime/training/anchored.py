"""Anchored training: batches drawn ahead from the trainer's own loader, and offsets for them before their steps.

Of transformers' semi-private surface this relies on `Trainer.get_batch_samples`, which is called once for each
optimizer step with the iterator of the epoch, and on `training_step`, which is then called once for each batch in that
order.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.meter import Meter
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.anchors.report import AnchorReport
from onelayer.runtime.training.callbacks import Progress
from onelayer.runtime.training.inputs import TrainModel
from onelayer.runtime.training.settings import TrainSettings


class Anchoring:
    """Anchors that are renewed every `every` optimizer steps, and where an epoch begins."""

    def __init__(self, anchors: Anchors, every: int, bar: Progress) -> None:
        self.anchors, self.every, self.bar = anchors, every, bar
        self._drawn: deque[Any] = deque()

    def report(self) -> AnchorReport:
        """Return what it has cost so far."""
        return self.anchors.report(self.every)

    def ahead(self, epoch: Iterator[Any], batches_per_step: int, steps_left: int) -> Iterator[Any]:
        """Return the batches of `epoch` in order. If all that were drawn are used up, draw more and find their offsets.

        No batch is drawn that no step is left for.
        """
        if not self._drawn:
            self._drawn.extend(islice(epoch, batches_per_step * min(self.every, steps_left)))
            if self._drawn:
                self.anchors.renew(list(self._drawn), self.bar)
        return (self._drawn.popleft() for _ in range(len(self._drawn)))


class AnchoredTrainer(Trainer):
    """A Trainer that can anchor the model for each batch."""

    anchoring: Anchoring | None = None
    bar: Progress

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Collect the batches of one optimizer step, from those that were drawn ahead if the model is anchored."""
        if self.anchoring is not None:
            steps_left = self.state.max_steps - self.state.global_step
            batches_per_step = self.args.gradient_accumulation_steps
            epoch_iterator = self.anchoring.ahead(epoch_iterator, batches_per_step, steps_left)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch, anchored."""
        if self.anchoring is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self.anchoring.anchors.next_batch():
            return super().training_step(model, inputs, *args, **kwargs)


class SaveAtRenewals(TrainerCallback):
    """Postpones each checkpoint to the next renewal, so that a resumed run finds the offsets of an undisturbed one."""

    def __init__(self, anchors: Anchors) -> None:
        self._anchors = anchors
        self._is_due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save at once if the next step begins with a renewal."""
        self._is_due |= control.should_save
        control.should_save = self._is_due and self._anchors.is_used_up
        self._is_due &= not control.should_save


def anchor(
    trainer: AnchoredTrainer, emulator: TrainModel, original: Path, settings: TrainSettings, meter: Meter
) -> Anchoring:
    """Let the trainer anchor its model by the original in a directory, as `settings` say."""
    assert settings.anchor_every is not None
    adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
    facts = Emulator.open(emulator.directory).facts
    anchors = Anchors(adapted, facts, original, settings.anchor_bits, meter, trainer.accelerator.autocast)
    trainer.anchoring = Anchoring(anchors, settings.anchor_every, trainer.bar)
    trainer.add_callback(SaveAtRenewals(anchors))
    steps = trainer.args.save_steps
    if trainer.args.save_strategy == SaveStrategy.STEPS and steps % settings.anchor_every:
        notice(f"save_steps {steps:g}: each checkpoint waits for the renewal of the anchors that follows")
    return trainer.anchoring
