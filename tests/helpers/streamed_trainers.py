"""Stock trainers on a resident and on a streamed model: a directory in, the losses and adapters of both compared."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from helpers.tiny_models import tiny_tokenizer
from helpers.training_rows import TEXTS
from onelayer.compiler.adapters.attach import linear_targets
from onelayer.runtime import streamed_for_training

COMMON: dict[str, Any] = {
    "activation_checkpointing": True,  # what a streamed model does anyway
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-2,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def lora(model: Any, **fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=linear_targets(model, "all-linear"), **fields)


def sft(model: Any, out: Path, **changes: Any) -> Any:
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    config = SFTConfig(output_dir=str(out), max_length=24, **{**COMMON, "bf16": False, **changes})
    given = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tiny_tokenizer()}
    return SFTTrainer(model=model, args=config, peft_config=lora(model, task_type="CAUSAL_LM"), **given)


def dpo(model: Any, out: Path, **changes: Any) -> Any:
    rows = [{"prompt": text, "chosen": " it is eight", "rejected": " rome"} for text in TEXTS]
    config = DPOConfig(output_dir=str(out), max_length=24, **{**COMMON, "bf16": False, **changes})
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
    return DPOTrainer(model=model, args=config, peft_config=lora(model, task_type="CAUSAL_LM"), **given)


def kto(model: Any, out: Path, **changes: Any) -> Any:
    rows = [{"prompt": text, "completion": " it is eight", "label": len(text) % 2 == 0} for text in TEXTS]
    config = KTOConfig(output_dir=str(out), max_length=24, **{**COMMON, "bf16": False, **changes})
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
    return KTOTrainer(model=model, args=config, peft_config=lora(model, task_type="CAUSAL_LM"), **given)


def classes(model: Any, out: Path, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(TEXTS)]
    return transformers.Trainer(
        model=peft.get_peft_model(model, lora(model, task_type="SEQ_CLS")),
        args=transformers.TrainingArguments(output_dir=str(out), **{**COMMON, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


def sequences(model: Any, out: Path, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": tokenizer(text[:9])["input_ids"]} for text in TEXTS]
    return transformers.Seq2SeqTrainer(
        model=peft.get_peft_model(model, lora(model, task_type="SEQ_2_SEQ_LM")),
        args=transformers.Seq2SeqTrainingArguments(output_dir=str(out), **{**COMMON, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    parameters = trainer.model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in parameters if parameter.requires_grad}


def losses(trainer: Any) -> list[float]:
    history = trainer.state.log_history
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def check_equal(make: Callable[..., Any], directory: Path, **changes: Any) -> Any:
    """Train both models and compare; returns the trainer of the streamed model."""
    (name,) = transformers.AutoConfig.from_pretrained(directory).architectures
    pair, adapters = [], []
    for open_model in (getattr(transformers, name).from_pretrained, streamed_for_training):
        torch.manual_seed(0)
        pair.append(make(open_model(directory), directory.parent / open_model.__name__, **changes))
        adapters.append(trained(pair[-1]))
    assert losses(pair[1]) == pytest.approx(losses(pair[0]), rel=1e-6)
    assert adapters[1].keys() == adapters[0].keys()
    for key, expected in adapters[0].items():
        assert expected.abs().max() > 0
        # Adam divides what rounding leaves of a gradient by itself, so an adapter differs by more than its gradients.
        torch.testing.assert_close(adapters[1][key], expected, rtol=0, atol=2e-4 * COMMON["learning_rate"], msg=key)
    return pair[1]
