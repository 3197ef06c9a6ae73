"""A model, token rows and checked arguments in, a trainer with a fresh LoRA adapter attached out.

Imports trl, transformers and torch; import it where training starts.
"""

from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig

from onelayer.compiler.errors import InputError
from onelayer.compiler.lora_targets import linear_targets
from onelayer.runtime.sft import ClassTrainer, LoraTrainer, MarkComplete, Progress
from onelayer.runtime.train_inputs import TrainData, TrainModel
from onelayer.runtime.train_settings import LoraFields


def make_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any], work: Path, cuda: bool
) -> LoraTrainer | ClassTrainer:
    """The trainer for what the model predicts. Raises `InputError` where arguments or targets do not fit together."""
    dtype = model.config.dtype
    precision = {"bf16": cuda and dtype == torch.bfloat16, "fp16": cuda and dtype == torch.float16}
    own = {"output_dir": str(work), "use_cpu": not cuda, **precision}
    make = _token_trainer if model.classes is None else _class_trainer
    try:
        trainer = make(model, examples, fields, {**own, **arguments})
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # combinations of arguments, and target modules, that they refuse
        raise InputError(f"training cannot start: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _token_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any]
) -> LoraTrainer:
    # Rows are ready for the collator as they are, unless TRL is to pack them.
    config = SFTConfig(**{"dataset_kwargs": {"skip_prepare_dataset": not arguments.get("packing")}, **arguments})
    loaded = model.load()
    return LoraTrainer(
        model=loaded,
        args=config,
        train_dataset=Dataset.from_list(examples.rows),
        processing_class=model.tokenizer,
        peft_config=_lora_config(loaded, fields, task_type="CAUSAL_LM"),
        callbacks=[Progress(), MarkComplete()],
    )


def _class_trainer(
    model: TrainModel, examples: TrainData, fields: LoraFields, arguments: dict[str, Any]
) -> ClassTrainer:
    """The head is a module to save, as PEFT has it, or with an empty `modules_to_save` left as it is."""
    del arguments["max_length"]  # rows are cut already
    for name in {field.name for field in fields_of(SFTConfig)} - {field.name for field in fields_of(TrainingArguments)}:
        if name in arguments:
            raise InputError(f"args.{name}: is for models that predict tokens, not for {model.directory}; leave it out")
    pads = (getattr(model.config.get_text_config(), "pad_token_id", None), model.tokenizer.pad_token_id)
    if arguments["per_device_train_batch_size"] > 1 and (None in pads or pads[0] != pads[1]):
        raise InputError(
            f"{model.directory}: pad_token_id is {pads[0]} in config.json and {pads[1]} in the tokenizer, so a "
            "classifier cannot tell where padded texts end; set both alike, or set batch_size to 1"
        )
    config = TrainingArguments(**arguments)
    loaded = model.load()
    set_seed(config.seed)
    if fields.modules_to_save == []:
        excluded = fields.exclude_modules  # a pattern is a person's whole choice
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
        callbacks=[Progress(), MarkComplete()],
    )


def _class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the rows of a step. Some models' own is over a micro-batch, whatever its share."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _lora_config(loaded: PreTrainedModel, fields: LoraFields, **more: Any) -> peft.LoraConfig:
    transposed = any(isinstance(module, Conv1D) for module in loaded.modules())
    targets = linear_targets(loaded, fields.target_modules)
    given = {**fields.model_dump(), "target_modules": targets, "fan_in_fan_out": transposed, **more}
    return peft.LoraConfig(**given)
