"""Trainers that know nothing of streams: the losses and adapters of the resident model, for every kind of model."""

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
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from helpers.classifiers import save_classifier
from helpers.tiny_models import save_tiny, tiny_tokenizer
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


def classes(model: Any, out: Path) -> Any:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(TEXTS)]
    return transformers.Trainer(
        model=peft.get_peft_model(model, lora(model, task_type="SEQ_CLS")),
        args=transformers.TrainingArguments(output_dir=str(out), **COMMON),
        train_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


def sequences(model: Any, out: Path) -> Any:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": tokenizer(text[:9])["input_ids"]} for text in TEXTS]
    return transformers.Seq2SeqTrainer(
        model=peft.get_peft_model(model, lora(model, task_type="SEQ_2_SEQ_LM")),
        args=transformers.Seq2SeqTrainingArguments(output_dir=str(out), **COMMON),
        train_dataset=Dataset.from_list(rows),
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


def test_sft_with_evaluation_and_packing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    trainer = check_equal(sft, tmp_path / "model", packing=True, eval_strategy="steps", eval_steps=1)
    assert len(losses(trainer)) == 4


def test_sft_of_a_mixture_in_bfloat16(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model", torch.bfloat16)
    check_equal(sft, tmp_path / "model", bf16=True, gradient_accumulation_steps=2, router_aux_loss_coef=0.5)


def test_dpo_with_the_adapter_switched_off_as_the_reference(tmp_path: Path) -> None:
    save_tiny("llama_tied", tmp_path / "model")
    trainer = check_equal(dpo, tmp_path / "model")
    assert losses(trainer)[1] < losses(trainer)[0]


def test_a_classifier_whose_head_is_trained_whole(tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        save_classifier(family, tmp_path / family / "model", pad_token_id=0)
        check_equal(classes, tmp_path / family / "model")


def test_an_encoder_decoder(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path / "model")
    check_equal(sequences, tmp_path / "model")


def test_a_resumed_training_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = trained(sft(streamed_for_training(tmp_path / "model"), tmp_path / "out", **saving))
    again = sft(streamed_for_training(tmp_path / "model"), tmp_path / "out", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed = dict(again.model.named_parameters())
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out" / "checkpoint-3"
    )
    saved = {name: parameter for name, parameter in loaded.named_parameters() if name in whole}
    assert all(torch.equal(saved[name], value) for name, value in whole.items())
