"""Makes a trainer with a fresh LoRA adapter attached, from a model, token rows and checked arguments.

It imports trl, transformers and torch, so import it only when training starts.
"""

import math
import warnings
from contextlib import nullcontext
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
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import write_json
from onelayer.runtime.activations.figures import SavedBytes
from onelayer.runtime.training.anchored import AnchoredTrainer
from onelayer.runtime.training.callbacks import MarkComplete, Progress
from onelayer.runtime.training.checkpoints import FIRST_BATCH_FILE, FirstBatch
from onelayer.runtime.training.compressed_activations import TrainActivations
from onelayer.runtime.training.inputs import TrainData, TrainModel
from onelayer.runtime.training.settings import LoraFields


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
        """Compute the loss; the first call of all also counts what is saved for its backward pass."""
        if self.first_batch is not None:
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
        """Compute the model's own loss of a batch, without TRL's metrics and DDP's bookkeeping."""
        bare = self.accelerator.unwrap_model(model).train()
        with self.compute_loss_context_manager():
            loss: torch.Tensor = bare(**self._prepare_inputs(inputs)).loss
        return loss


class LoraTrainer(AnchoredTrainer, _GuardedTrainer, SFTTrainer):
    """The trainer for models that predict tokens."""


class ClassTrainer(AnchoredTrainer, _GuardedTrainer):
    """The trainer for sequence classifiers, which pads rows to the longest of their batch."""


def make_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any], work: Path, on_gpu: bool
) -> LoraTrainer | ClassTrainer:
    """Make the trainer for the model. Raises `InputError` if arguments or targets do not fit together."""
    dtype = model.config.dtype
    precision = {"bf16": on_gpu and dtype == torch.bfloat16, "fp16": on_gpu and dtype == torch.float16}
    own = {"output_dir": str(work), "use_cpu": not on_gpu, **precision}
    make = _token_trainer if model.classes is None else _class_trainer
    try:
        trainer = make(model, examples, fields, {**own, **arguments})
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # arguments and target modules that the libraries refuse
        raise InputError(f"training cannot start: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.bar = Progress()
    trainer.add_callback(trainer.bar)
    return trainer


def _token_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any]
) -> LoraTrainer:
    # Rows are ready for the collator, unless TRL packs them.
    config = SFTConfig(**{"dataset_kwargs": {"skip_prepare_dataset": not arguments.get("packing")}, **arguments})
    loaded = model.load()
    return LoraTrainer(
        model=loaded,
        args=config,
        train_dataset=Dataset.from_list(examples.rows),
        processing_class=model.tokenizer,
        peft_config=_lora_config(loaded, fields, task_type="CAUSAL_LM"),
        callbacks=[MarkComplete()],
    )


def _class_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any]
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
        train_dataset=Dataset.from_list(examples.rows),
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
