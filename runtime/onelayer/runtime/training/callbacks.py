"""Callbacks of the trainers (progress, complete checkpoints, stops, scores), and the losses in the trainers' log.

It imports transformers and torch, so import it only when training starts.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from onelayer.compiler.machine.console import StopRequest, open_bar
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import GIB
from onelayer.compiler.storage.files import sync
from onelayer.runtime.training.checkpoints import HeldOutScore, mark_complete, remove_older

SHOWN = {"loss": "loss", "eval_loss": "held-out loss"}  # by their names in the trainer's log


class Progress(TrainerCallback):
    """Progress over steps with the loss on stderr. Trainer's own bar prints to stdout.

    Streams show in the same bar; `streams` is what they are for.
    """

    streams = "anchoring"

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the present step if the run is resumed."""
        self._bar = open_bar(state.max_steps, "train", "step", state.global_step)

    def reached(self, count: int, unit: str, peak_bytes: int, note: str = "") -> None:
        """Show that a stream of the original has run `count` of its units."""
        parts = (f"{self.streams}, {unit}", note, f"peak {peak_bytes / GIB:.2f} GiB")
        self._bar.set_postfix_str(", ".join(part for part in parts if part))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the newest loss, and the newest on held-out rows."""
        if newest := {name: logs[key] for key, name in SHOWN.items() if logs and key in logs}:
            self._shown |= newest
            text = ", ".join(f"{name} {loss:.4f}" for name, loss in self._shown.items())
            self._bar.set_postfix_str(text, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self._bar.close()


class MarkComplete(TrainerCallback):
    """A callback that marks each checkpoint after all of its files are on the disk, and then removes older ones."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Flush and mark the new checkpoint, into which every process has written; keep `save_total_limit` of them."""
        processes().wait()
        processes().by_first(lambda: self._mark(args, state))

    def _mark(self, args: TrainingArguments, state: TrainerState) -> None:
        assert args.output_dir is not None
        work = Path(args.output_dir)
        checkpoint = work / f"checkpoint-{state.global_step}"
        if not args.save_only_model:  # a run cannot resume without the optimizer's state
            for path in checkpoint.iterdir():
                sync(path)
            mark_complete(checkpoint)
        remove_older(work, args.save_total_limit)


class SaveAndStop(TrainerCallback):
    """A callback that saves a checkpoint and ends the training after the step in which a stop was requested."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if asked to."""
        if self._stop.is_asked():
            control.should_save = control.should_training_stop = True


class ScoreAtEnd(TrainerCallback):
    """A callback that scores the held-out rows after the last step, whatever the steps between scores are."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score if no step is left."""
        control.should_evaluate |= state.global_step >= state.max_steps


def held_out_scores(history: list[dict[str, float]]) -> list[HeldOutScore]:
    """List the scores on held-out rows in Trainer's log."""
    return [
        HeldOutScore(
            step=int(entry["step"]),
            loss=entry["eval_loss"],
            preference_accuracy=entry.get("eval_rewards/accuracies"),
        )
        for entry in history
        if "eval_loss" in entry
    ]


def logged_losses(history: list[dict[str, float]]) -> list[tuple[int, float]]:
    """List step and loss of every entry in Trainer's log."""
    return [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]


def mean_loss(history: list[dict[str, float]]) -> float:
    """Compute the mean training loss over all steps, including those before a resume, from Trainer's log.

    Each entry holds the mean since the previous entry.
    """
    entries = logged_losses(history)
    starts = [0, *(step for step, _ in entries)]
    weights = [step - start for (step, _), start in zip(entries, starts, strict=False)]
    return sum(weight * loss for weight, (_, loss) in zip(weights, entries, strict=True)) / sum(weights)
