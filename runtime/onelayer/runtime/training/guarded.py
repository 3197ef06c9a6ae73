"""What every trainer does beyond its library's: it stops at a loss that is not finite, and measures its first batch.

It imports transformers and torch, so import it only when training starts.
"""

import copy
import errno
import math
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
from pydantic import BaseModel, Field
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from onelayer.compiler.data.tokens import IGNORED
from onelayer.compiler.documents import checked_document
from onelayer.compiler.machine.devices import forked_random
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import return_free_memory
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.activations.compression import compress_activations
from onelayer.runtime.activations.figures import Figures, SavedBytes
from onelayer.runtime.activations.probe import Loss, choose_rank, gradient_report, report
from onelayer.runtime.activations.report import ActivationReport
from onelayer.runtime.training.checkpoints import FIRST_BATCH_FILE, FirstBatch
from onelayer.runtime.training.settings import TrainSettings

# What TRL's trainers count in `compute_loss`, for their log.
TRL_COUNTS = ("_metrics", "_total_train_tokens")


# A checkpoint holds each trained value and two moments of it.
OPTIMIZED_COPIES = 3
RANK_FILE = "activation_rank.json"


class _ChosenRank(BaseModel):
    """The file `RANK_FILE`; no rank keeps activations exactly."""

    rank: Annotated[float, Field(gt=0, lt=1)] | None


class TrainActivations:
    """The compression on a trainer's model. A measured rank is kept in `work`, so a resumed run uses it too."""

    def __init__(self, model: nn.Module, settings: TrainSettings, work: Path) -> None:
        assert settings.activations != "none"
        rank: Any = settings.activation_rank
        self._file = work / RANK_FILE
        self._choosing = rank == "auto" and not self._file.is_file()
        self._reporting = settings.activation_report
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._compression = compress_activations(
            model, rank=0.5 if rank == "auto" else rank, where=settings.activations, seed=settings.seed
        )
        if rank == "auto" and self._file.is_file():
            remedy = "remove the file to measure the rank again"
            self._compression.rank = checked_document(_ChosenRank, read_json(self._file), self._file, remedy).rank
        self.measured: ActivationReport | None = None

    @property
    def wants_first_batch(self) -> bool:
        """Whether the first batch is still needed to choose the rank or to compare gradients."""
        return self._choosing or self._reporting

    def measure_first_batch(self, loss: Loss) -> None:
        """Choose the rank and compare gradients with the loss of the first batch, if requested."""
        if self._choosing:
            # Processes measure different rows. All use the largest rank, and so does a run that goes on.
            ranks = processes().gather(choose_rank(self._compression, self._parameters, loss))
            self._compression.rank = rank = max(ranks, key=lambda rank: math.inf if rank is None else rank)
            processes().by_first(lambda: write_json(self._file, {"rank": rank}))
        if self._reporting:
            self.measured = gradient_report(self._compression, self._parameters, loss)
        self._choosing = self._reporting = False

    @contextmanager
    def counted(self) -> Iterator[Figures]:
        """Count what compression keeps inside the `with` block; the count is the report if no other was requested."""
        with self._compression.measure(with_errors=False) as figures:
            yield figures
        if self.measured is None:
            self.measured = report(self._compression, figures, None)


class GuardedTrainer(Trainer):
    """A Trainer that stops before a step with a non-finite loss, and measures its first forward pass."""

    first_batch: FirstBatch | None = None
    activations: TrainActivations | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start like TRL's trainer, but hide a warning about PEFT's use of a deprecated name, which no user can fix."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; the first call of all in training also counts what is saved for its backward pass."""
        if self.first_batch is not None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        compressed = nullcontext(None) if self.activations is None else self.activations.counted()
        with SavedBytes(model) as saved, compressed as figures:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        measured = self.activations.measured if self.activations is not None else None
        self.first_batch = FirstBatch(saved_activation_bytes=saved.total(figures), activations=measured)
        if self.args.should_save:
            assert self.args.output_dir is not None
            write_json(Path(self.args.output_dir) / FIRST_BATCH_FILE, self.first_batch.model_dump(mode="json"))
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint. Raises `OSError` with the remedy if the disk is full, whatever its writers raise then.

        Trainer would remove older ones now; `MarkComplete` does so when the new one is complete.
        """
        assert self.args.output_dir is not None
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
            full = getattr(error, "errno", None) == errno.ENOSPC
            if not full and shutil.disk_usage(self.args.output_dir).free > OPTIMIZED_COPIES * trained:
                raise
            raise OSError(
                errno.ENOSPC,
                f"{self.args.output_dir}: the disk is full, the checkpoint of step {self.state.global_step} does not "
                f"fit ({OPTIMIZED_COPIES * trained} bytes); make room and go on with --resume, the one before is kept",
            ) from error
        finally:
            self.args.save_total_limit = limit

    def take_up_finished(self, checkpoint: Path) -> bool:
        """Take state and adapter from a checkpoint of the last step; false for one that has steps left.

        Trainer itself would fail there, or take one step too many.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        adapted: Any = self.accelerator.unwrap_model(self.model)
        adapted.load_adapter(str(checkpoint), adapted.active_adapter, is_trainable=True)
        return True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch; raise before the optimizer can use a non-finite loss."""
        if self.activations is not None and self.first_batch is None and self.activations.wants_first_batch:
            self.activations.measure_first_batch(lambda: self._plain_loss(model, inputs))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(float(loss)):
            step = self.state.global_step + 1
            raise FloatingPointError(
                f"the loss is {float(loss)} in step {step}; lower the learning rate, or check the data"
            )
        if self.args.device.type == "cpu":  # rows of other lengths would add to the holes that these leave
            return_free_memory()
        return loss

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the loss of a batch as training does, with the head in slices, but without metrics and DDP."""
        bare = self.accelerator.unwrap_model(model).train()
        kept = {name: copy.deepcopy(getattr(self, name)) for name in TRL_COUNTS if hasattr(self, name)}
        with self.compute_loss_context_manager():
            loss: Any = super().compute_loss(bare, dict(self._prepare_inputs(inputs)))
        vars(self).update(kept)
        assert isinstance(loss, torch.Tensor)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out rows. The random numbers of the training stay as they are."""
        with forked_random():
            scores: dict[str, float] = super().evaluate(*args, **kwargs)
        return scores


@dataclass
class HeldOutSums:
    """The sum of losses over held-out tokens, and the number of these."""

    loss: float = 0.0
    tokens: int = 0

    def add(self, mean_loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss over what `labels` (B, T) count."""
        tokens = int((labels != IGNORED).sum())
        self.loss, self.tokens = self.loss + float(mean_loss) * tokens, self.tokens + tokens

    def mean(self, accelerator: Any) -> float:
        """Compute the mean over the tokens of all processes."""
        sums = torch.tensor([self.loss, self.tokens], dtype=torch.float64).to(accelerator.device)
        total, tokens = accelerator.reduce(sums, "sum").tolist()
        return float(total / tokens)


class ScoredByToken(Trainer):
    """A Trainer whose held-out loss is a mean over tokens. Trainer's own mean weighs each batch by its rows."""

    _first_label = 0  # labels of a row before this one are predicted by nothing
    _held_out = HeldOutSums()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Score the held-out rows by token."""
        self._held_out = HeldOutSums()
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics["eval_loss"] = self._held_out.mean(self.accelerator)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score one batch."""
        labels = inputs["labels"]
        scored = super().prediction_step(model, inputs, *args, **kwargs)
        assert scored[0] is not None
        self._held_out.add(scored[0], labels[..., self._first_label :])
        return scored


@contextmanager
def global_random_state() -> Iterator[None]:
    """Restore the states of the global generators, which Trainer seeds: a library call must not change them."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with forked_random():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
