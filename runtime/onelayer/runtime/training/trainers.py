"""Makes a trainer with a fresh LoRA adapter attached, from a model, token rows and checked arguments.

It imports trl, transformers and torch, so import it only when training starts.
"""

from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.data.classes import is_transcriber, reads_media_alone
from onelayer.compiler.data.preferences import PreferenceMethod
from onelayer.compiler.data.tokens import IGNORED, RowInputs
from onelayer.compiler.errors import InputError
from onelayer.runtime.collators.classes import ClassCollator
from onelayer.runtime.collators.media import ROW, MediaCollator
from onelayer.runtime.collators.transcripts import TranscriptCollator
from onelayer.runtime.training.anchored import AnchoredTrainer
from onelayer.runtime.training.callbacks import MarkComplete, Progress, ScoreAtEnd
from onelayer.runtime.training.denoising import DenoisingTrainer, denoising_trainer
from onelayer.runtime.training.guarded import GuardedTrainer, ScoredByToken
from onelayer.runtime.training.inputs import TrainData, TrainModel
from onelayer.runtime.training.preference_trainers import DpoTrainer, KtoTrainer, preference_trainer
from onelayer.runtime.training.settings import LoraFields
from onelayer.runtime.training.trainer_args import Method


class LoraTrainer(AnchoredTrainer, GuardedTrainer, ScoredByToken, SFTTrainer):
    """The trainer for models that predict the next token."""

    _first_label = 1


class SequenceTrainer(AnchoredTrainer, GuardedTrainer, ScoredByToken):
    """The trainer for encoder-decoders, which read one sequence of tokens or a medium, and predict another."""


class ClassTrainer(AnchoredTrainer, GuardedTrainer):
    """The trainer for sequence classifiers, which pads rows to the longest of their batch."""


OurTrainer = DenoisingTrainer | LoraTrainer | SequenceTrainer | ClassTrainer | DpoTrainer | KtoTrainer
Rows = tuple[TrainData, TrainData | None]  # to train on, and held out


def make_trainer(
    method: Method,
    model: TrainModel,
    rows: Rows,
    fields: LoraFields,
    arguments: dict[str, Any],
    work: Path,
    on_gpu: bool,
) -> OurTrainer:
    """Make the trainer for the model. Raises `InputError` if arguments or targets do not fit together."""
    dtype = model.dtype
    precision = {"bf16": on_gpu and dtype == torch.bfloat16, "fp16": on_gpu and dtype == torch.float16}
    own = {"output_dir": str(work), "use_cpu": not on_gpu, **precision}
    if rows[1] is not None:
        batch_size = arguments["per_device_train_batch_size"]
        strategy = "no" if arguments.get("eval_steps") is None else "steps"
        own |= {"eval_strategy": strategy, "per_device_eval_batch_size": batch_size, "prediction_loss_only": True}
    arguments = {**own, **arguments}
    try:
        if model.denoises:
            trainer: OurTrainer = denoising_trainer(model.load(), rows[0], rows[1], fields, arguments)
        elif method != "sft":
            trainer = _preference_trainer(method, model, rows, fields, arguments)
        elif model.classes is None and model.config.is_encoder_decoder:
            trainer = _sequence_trainer(model, rows, fields, arguments)
        elif model.classes is None:
            trainer = _token_trainer(model, rows, fields, arguments)
        else:
            trainer = _class_trainer(model, rows, fields, arguments)
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # arguments and target modules that the libraries refuse
        raise InputError(f"training cannot start: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.bar = Progress()
    trainer.add_callback(trainer.bar)
    if rows[1] is not None:
        trainer.add_callback(ScoreAtEnd())
    return trainer


def _data_sets(rows: Rows) -> dict[str, Dataset | None]:
    """Return the data sets of a trainer, by the names of its parameters."""
    train, held_out = (None if data is None else Dataset.from_list(data.rows) for data in rows)
    return {"train_dataset": train, "eval_dataset": held_out}


def _numbered(sets: dict[str, Any], rows: Rows) -> list[RowInputs | None]:
    """Number the rows of all data sets in a column, and list their other inputs in that order."""
    inputs: list[RowInputs | None] = []
    for name, data in zip(sets, rows, strict=True):
        if data is not None:
            numbers = list(range(len(inputs), len(inputs) + len(data.rows)))
            sets[name] = sets[name].add_column(ROW, numbers)
            inputs += data.inputs or [None] * len(data.rows)
    return inputs


def _pad_token_id(model: TrainModel) -> int:
    """Return what rows are padded with, as TRL chooses it: nothing reads it, since it is masked."""
    tokenizer: Any = model.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _token_trainer(model: TrainModel, rows: Rows, fields: LoraFields, arguments: dict[str, Any]) -> LoraTrainer:
    # Rows are ready for the collator, unless TRL packs them.
    defaults: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": not arguments.get("packing")}}
    sets, media = _data_sets(rows), {}
    if any(data is not None and data.inputs is not None for data in rows):
        for name in ("packing", "padding_free"):
            if arguments.get(name):
                raise InputError(f"{name}: rows with images or audio stay apart; leave it out")
        media["data_collator"] = MediaCollator(_numbered(sets, rows), _pad_token_id(model))
        defaults["remove_unused_columns"] = False
    config = SFTConfig(**{**defaults, **arguments})
    loaded = model.load()
    return LoraTrainer(
        model=loaded,
        args=config,
        **sets,
        **media,
        processing_class=model.tokenizer,
        peft_config=_lora_config(loaded, fields, task_type="CAUSAL_LM"),
        callbacks=[MarkComplete()],
    )


def _preference_trainer(
    method: PreferenceMethod, model: TrainModel, rows: Rows, fields: LoraFields, arguments: dict[str, Any]
) -> DpoTrainer | KtoTrainer:
    loaded = model.load()
    return preference_trainer(
        method,
        arguments,
        model=loaded,
        **_data_sets(rows),
        processing_class=model.tokenizer,
        peft_config=_lora_config(loaded, fields, task_type="CAUSAL_LM"),
        callbacks=[MarkComplete()],
    )


def _sequence_trainer(model: TrainModel, rows: Rows, fields: LoraFields, arguments: dict[str, Any]) -> SequenceTrainer:
    sets, media = _data_sets(rows), is_transcriber(model.model_class)
    collator: Any = TranscriptCollator(_numbered(sets, rows), model.config) if media else None
    config = _plain_config(model, {**arguments, "remove_unused_columns": False} if media else arguments)
    loaded = model.load()
    if collator is None and not hasattr(loaded, "prepare_decoder_input_ids_from_labels"):
        raise InputError(f"{model.directory}: {type(loaded).__name__} does not say what its decoder reads of labels")
    set_seed(config.seed)
    # PEFT's own wrapper for encoder-decoders hands token ids to every model.
    lora = _lora_config(loaded, fields, **({} if media else {"task_type": "SEQ_2_SEQ_LM"}))
    return SequenceTrainer(
        model=peft.get_peft_model(loaded, lora),
        args=config,
        **sets,
        data_collator=collator or DataCollatorForSeq2Seq(model.tokenizer, loaded, label_pad_token_id=IGNORED),
        compute_loss_func=_sequence_loss,
        processing_class=model.tokenizer,
        callbacks=[MarkComplete()],
    )


def _plain_config(model: TrainModel, arguments: dict[str, Any]) -> TrainingArguments:
    """Return the arguments of transformers' own Trainer. Raises `InputError` for those that only TRL's has."""
    del arguments["max_length"]  # rows are already truncated
    for name in {field.name for field in fields_of(SFTConfig)} - {field.name for field in fields_of(TrainingArguments)}:
        if name in arguments:
            raise InputError(
                f"args.{name}: applies to models that predict the next token, not to {model.directory}; leave it out"
            )
    return TrainingArguments(**arguments)


def _class_trainer(model: TrainModel, rows: Rows, fields: LoraFields, arguments: dict[str, Any]) -> ClassTrainer:
    """Save the head too, as PEFT does by default. With an empty `modules_to_save` it stays unchanged."""
    sets, alone = _data_sets(rows), reads_media_alone(model.model_class)
    processing: dict[str, Any] = {}
    if alone:
        processing["data_collator"] = ClassCollator(_numbered(sets, rows))
        arguments = {**arguments, "remove_unused_columns": False}  # no column is an argument of the model yet
    else:
        processing = {"data_collator": DataCollatorWithPadding(model.tokenizer), "processing_class": model.tokenizer}
        _check_padding(model, arguments["per_device_train_batch_size"])
    config = _plain_config(model, arguments)
    loaded = model.load()
    set_seed(config.seed)
    if alone or fields.modules_to_save == []:
        excluded = fields.exclude_modules  # a pattern already decides what is excluded
        if not isinstance(excluded, str):
            excluded = [*(excluded or ()), *SEQ_CLS_HEAD_NAMES]
        saved = fields.modules_to_save
        if saved is None:  # PEFT's own wrapper for classifiers hands arguments of texts to every model
            saved = [name for name, _ in loaded.named_children() if name in SEQ_CLS_HEAD_NAMES]
        lora = _lora_config(loaded, fields, modules_to_save=saved or None, exclude_modules=excluded)
    else:
        lora = _lora_config(loaded, fields, task_type="SEQ_CLS")
    return ClassTrainer(
        model=peft.get_peft_model(loaded, lora),
        args=config,
        **sets,
        compute_loss_func=_class_loss,
        **processing,
        callbacks=[MarkComplete()],
    )


def _check_padding(model: TrainModel, batch_size: int) -> None:
    """Raise `InputError` if a classifier cannot tell where the texts of a batch end."""
    pads = (getattr(model.config.get_text_config(), "pad_token_id", None), model.tokenizer.pad_token_id)
    if batch_size > 1 and (None in pads or pads[0] != pads[1]):
        raise InputError(
            f"{model.directory}: pad_token_id is {pads[0]} in config.json and {pads[1]} in the tokenizer, so a "
            "classifier cannot tell where padded texts end; set both to the same id, or set batch_size to 1"
        )


def _class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Compute mean cross-entropy over the rows of a step. Some models average over each micro-batch instead."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _sequence_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Compute mean cross-entropy over the labeled tokens of a step, where position t predicts label t."""
    logits, wanted = outputs.logits.float().flatten(0, 1), labels.flatten()
    loss = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return loss / ((wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _lora_config(loaded: PreTrainedModel, fields: LoraFields, **more: Any) -> peft.LoraConfig:
    transposed = any(isinstance(module, Conv1D) for module in loaded.modules())
    targets = linear_targets(loaded, fields.target_modules)
    given = {**fields.model_dump(), "target_modules": targets, "fan_in_fan_out": transposed, **more}
    return peft.LoraConfig(**given)
