"""Makes a trainer with a fresh LoRA adapter attached, from a model, token rows and checked arguments.

It imports trl, transformers and torch, so import it only when training starts.
"""

import copy
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.data.tokens import IGNORED
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import write_json
from onelayer.runtime.activations.figures import SavedBytes
from onelayer.runtime.training.anchored import AnchoredTrainer
from onelayer.runtime.training.callbacks import MarkComplete, Progress, ScoreAtEnd
from onelayer.runtime.training.checkpoints import FIRST_BATCH_FILE, FirstBatch
from onelayer.runtime.training.compressed_activations import TrainActivations
from onelayer.runtime.training.inputs import TrainData, TrainModel
from onelayer.runtime.training.settings import LoraFields

# What TRL's trainers count in `compute_loss`, for their log.
TRL_COUNTS = ("_metrics", "_total_train_tokens")


@dataclass
class HeldOutSums:
    """The sum of losses over held-out tokens, and the number of these."""

    loss: float = 0.0
    tokens: int = 0

    def add(self, mean_loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss over what `labels` (B, T) count, of which nothing predicts the first of a row."""
        tokens = int((labels[..., 1:] != IGNORED).sum())
        self.loss, self.tokens = self.loss + float(mean_loss) * tokens, self.tokens + tokens

    def mean(self, accelerator: Any) -> float:
        """Compute the mean over the tokens of all processes."""
        sums = torch.tensor([self.loss, self.tokens], dtype=torch.float64).to(accelerator.device)
        total, tokens = accelerator.reduce(sums, "sum").tolist()
        return float(total / tokens)


class _GuardedTrainer(Trainer):
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
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            scores: dict[str, float] = super().evaluate(*args, **kwargs)
        return scores


class LoraTrainer(AnchoredTrainer, _GuardedTrainer, SFTTrainer):
    """The trainer for models that predict tokens."""

    _held_out = HeldOutSums()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Score the held-out rows by token. Trainer's own mean weighs each batch by its rows."""
        self._held_out = HeldOutSums()
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics["eval_loss"] = self._held_out.mean(self.accelerator)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score one batch."""
        scored = super().prediction_step(model, inputs, *args, **kwargs)
        self._held_out.add(scored[0], inputs["labels"])
        return scored


class ClassTrainer(AnchoredTrainer, _GuardedTrainer):
    """The trainer for sequence classifiers, which pads rows to the longest of their batch."""


def make_trainer(
    model: TrainModel,
    examples: TrainData,
    held_out: TrainData | None,
    fields: LoraFields,
    arguments: dict[str, Any],
    work: Path,
    on_gpu: bool,
) -> LoraTrainer | ClassTrainer:
    """Make the trainer for the model. Raises `InputError` if arguments or targets do not fit together."""
    dtype = model.config.dtype
    precision = {"bf16": on_gpu and dtype == torch.bfloat16, "fp16": on_gpu and dtype == torch.float16}
    own = {"output_dir": str(work), "use_cpu": not on_gpu, **precision}
    if held_out is not None:
        batch_size = arguments["per_device_train_batch_size"]
        strategy = "no" if arguments.get("eval_steps") is None else "steps"
        own |= {"eval_strategy": strategy, "per_device_eval_batch_size": batch_size, "prediction_loss_only": True}
    make = _token_trainer if model.classes is None else _class_trainer
    try:
        trainer = make(model, examples, held_out, fields, {**own, **arguments})
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # arguments and target modules that the libraries refuse
        raise InputError(f"training cannot start: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.bar = Progress()
    trainer.add_callback(trainer.bar)
    if held_out is not None:
        trainer.add_callback(ScoreAtEnd())
    return trainer


def _rows(data: TrainData | None) -> Dataset | None:
    return None if data is None else Dataset.from_list(data.rows)


def _token_trainer(
    model: TrainModel, examples: TrainData, held_out: TrainData | None, fields: LoraFields, arguments: dict[str, Any]
) -> LoraTrainer:
    # Rows are ready for the collator, unless TRL packs them.
    config = SFTConfig(**{"dataset_kwargs": {"skip_prepare_dataset": not arguments.get("packing")}, **arguments})
    loaded = model.load()
    return LoraTrainer(
        model=loaded,
        args=config,
        train_dataset=_rows(examples),
        eval_dataset=_rows(held_out),
        processing_class=model.tokenizer,
        peft_config=_lora_config(loaded, fields, task_type="CAUSAL_LM"),
        callbacks=[MarkComplete()],
    )


def _class_trainer(
    model: TrainModel, examples: TrainData, held_out: TrainData | None, fields: LoraFields, arguments: dict[str, Any]
) -> ClassTrainer:
    """Save the head too, as PEFT does by default. With an empty `modules_to_save` it stays unchanged."""
    del arguments["max_length"]  # rows are already truncated
    for name in {field.name for field in fields_of(SFTConfig)} - {field.name for field in fields_of(TrainingArguments)}:
        if name in arguments:
            raise InputError(
                f"args.{name}: applies to models that predict tokens, not to {model.directory}; leave it out"
            )
    pads = (getattr(model.config.get_text_config(), "pad_token_id", None), model.tokenizer.pad_token_id)
    if arguments["per_device_train_batch_size"] > 1 and (None in pads or pads[0] != pads[1]):
        raise InputError(
            f"{model.directory}: pad_token_id is {pads[0]} in config.json and {pads[1]} in the tokenizer, so a "
            "classifier cannot tell where padded texts end; set both to the same id, or set batch_size to 1"
        )
    config = TrainingArguments(**arguments)
    loaded = model.load()
    set_seed(config.seed)
    if fields.modules_to_save == []:
        excluded = fields.exclude_modules  # a pattern already decides what is excluded
        if not isinstance(excluded, str):
            excluded = [*(excluded or ()), *SEQ_CLS_HEAD_NAMES]
        lora = _lora_config(loaded, fields, modules_to_save=None, exclude_modules=excluded)
    else:
        lora = _lora_config(loaded, fields, task_type="SEQ_CLS")
    return ClassTrainer(
        model=peft.get_peft_model(loaded, lora),
        args=config,
        train_dataset=_rows(examples),
        eval_dataset=_rows(held_out),
        data_collator=DataCollatorWithPadding(model.tokenizer),
        compute_loss_func=_class_loss,
        processing_class=model.tokenizer,
        callbacks=[MarkComplete()],
    )


def _class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Compute mean cross-entropy over the rows of a step. Some models average over each micro-batch instead."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _lora_config(loaded: PreTrainedModel, fields: LoraFields, **more: Any) -> peft.LoraConfig:
    transposed = any(isinstance(module, Conv1D) for module in loaded.modules())
    targets = linear_targets(loaded, fields.target_modules)
    given = {**fields.model_dump(), "target_modules": targets, "fan_in_fan_out": transposed, **more}
    return peft.LoraConfig(**given)
