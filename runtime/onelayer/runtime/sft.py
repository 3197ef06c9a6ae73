"""The trainers and what they leave out: a halt on a bad loss, a count of saved activations, complete checkpoints.

TRL's SFTTrainer trains models that predict tokens, transformers' own Trainer those that predict a class.
Imports trl, transformers and torch; import it where training starts.
"""

import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from onelayer.compiler.files import sync, write_text
from onelayer.runtime.activation_figures import Figures
from onelayer.runtime.train_activations import TrainActivations

# Written last into a checkpoint. Without it, a kill in the middle of saving would leave one that looks usable.
COMPLETE_FILE = "complete"


class _Watched(Trainer):
    """A Trainer that stops before a step on a loss that is no number, and measures its first forward pass."""

    saved_activation_bytes: int | None = None
    activations: TrainActivations | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's; PEFT's use of a deprecated name of transformers is nothing that a user could mend."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; in the first call, what is saved for its backward pass is counted."""
        if self.saved_activation_bytes is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        compressed = nullcontext(None) if self.activations is None else self.activations.counted()
        with SavedBytes(model) as saved, compressed as figures:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.saved_activation_bytes = saved.total(figures)
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; raises before the optimiser can use a loss that is no number."""
        if self.activations is not None and self.activations.unseen:
            self.activations.look(lambda: self._plain_loss(model, inputs))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(float(loss)):
            step = self.state.global_step + 1
            raise FloatingPointError(
                f"the loss is {float(loss)} in step {step}; lower the learning rate, or check the data"
            )
        return loss

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The model's own loss of a batch, past the metrics that TRL collects and past DDP's bookkeeping."""
        bare = self.accelerator.unwrap_model(model).train()
        with self.compute_loss_context_manager():
            loss: torch.Tensor = bare(**self._prepare_inputs(inputs)).loss
        return loss


class LoraTrainer(_Watched, SFTTrainer):
    """For models that predict tokens."""


class ClassTrainer(_Watched):
    """For sequence classifiers, whose rows are padded to the longest of their batch."""


class SavedBytes:
    """Counts what autograd keeps for the backward pass inside `with`: bytes of distinct storages, parameters left out.

    The inputs that torch's checkpointing keeps to recompute from are among them. Compression counts what it keeps
    itself, tensors as they are too, which autograd saves by the way.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def total(self, compression: Figures | None = None) -> int:
        """Bytes counted so far, with those that `compression` counted itself."""
        if compression is None:
            return sum(self._sizes.values())
        counted = {tensor.untyped_storage().data_ptr() for tensor in compression.exact}
        return compression.total_bytes + sum(size for at, size in self._sizes.items() if at not in counted)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._resident:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


class Progress(TrainerCallback):
    """A bar over steps on stderr with the loss; silent where stderr is no terminal. Trainer's own prints to stdout."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step that a resumed run begins with."""
        self._bar: Any = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=None, leave=False
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self._bar.close()


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once all of its files are on the disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Flush and mark the checkpoint just written."""
        if args.save_only_model:  # without the optimiser's state it cannot be continued from
            return
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in checkpoint.iterdir():
            sync(path)
        write_text(checkpoint / COMPLETE_FILE, f"{state.global_step}\n")


def newest_checkpoint(work: Path) -> Path | None:
    """The checkpoint to continue from, or None."""
    complete = [file.parent for file in work.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def logged_losses(history: list[dict[str, float]]) -> list[tuple[int, float]]:
    """Step and loss of every entry that Trainer logged."""
    return [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]


def mean_loss(history: list[dict[str, float]]) -> float:
    """The mean training loss over all steps, those before a resume too, from what Trainer logged.

    Each entry holds the mean since the entry before.
    """
    entries = logged_losses(history)
    starts = [0, *(step for step, _ in entries)]
    weights = [step - start for (step, _), start in zip(entries, starts, strict=False)]
    return sum(weight * loss for weight, (_, loss) in zip(weights, entries, strict=True)) / sum(weights)
