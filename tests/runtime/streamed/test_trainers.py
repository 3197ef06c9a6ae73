"""Trainers that know nothing of streams: the losses and adapters of the resident model, for every kind of model.

| | dense | mixture | encoder | encoder-decoder |
|---|---|---|---|---|
| trainers | SFT, DPO, KTO | SFT, DPO | Trainer | Seq2SeqTrainer |
| evaluation while training | yes | yes | yes | yes, with generated texts |
| packing | yes | | | |
| resume | yes | yes | yes | yes |
| bfloat16 | yes | yes | yes | |

`generate` of each is compared in `test_streamed_model.py`, and so is the encoder-decoder's loss in bfloat16: there the
resident model's own states differ by whether gradients are taken.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from helpers.classifiers import save_classifier
from helpers.streamed_trainers import check_equal, classes, dpo, kto, losses, sequences, sft, trained
from helpers.tiny_models import save_tiny
from onelayer.runtime import streamed_for_training

Make = Callable[..., Any]
Save = Callable[[Path], Any]


def saved(name: str) -> Save:
    return lambda path: save_tiny(name, path)


def saved_bert(path: Path) -> Any:
    return save_classifier("bert", path)


def test_sft_with_evaluation_and_packing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    trainer = check_equal(sft, tmp_path / "model", packing=True, eval_strategy="steps", eval_steps=1)
    assert len(losses(trainer)) == 4


def test_sft_of_a_mixture_in_bfloat16_with_evaluation(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model", torch.bfloat16)
    routed = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 0.5}
    trainer = check_equal(sft, tmp_path / "model", bf16=True, eval_strategy="steps", eval_steps=1, **routed)
    assert len(losses(trainer)) == 4


def test_dpo_with_the_adapter_switched_off_as_the_reference(tmp_path: Path) -> None:
    save_tiny("llama_tied", tmp_path / "model")
    trainer = check_equal(dpo, tmp_path / "model")
    assert losses(trainer)[1] < losses(trainer)[0]


def test_dpo_of_a_mixture(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    trainer = check_equal(dpo, tmp_path / "model")
    assert losses(trainer)[1] < losses(trainer)[0]


def test_kto(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    trainer = check_equal(kto, tmp_path / "model")
    assert losses(trainer)[1] != losses(trainer)[0]


def test_a_classifier_whose_head_is_trained_whole(tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        save_classifier(family, tmp_path / family / "model", pad_token_id=0)
        trainer = check_equal(classes, tmp_path / family / "model", eval_strategy="steps", eval_steps=1)
        assert len(losses(trainer)) == 4


@pytest.mark.parametrize(("make", "save"), [(sft, saved("llama")), (classes, saved_bert)])
def test_bfloat16_needs_no_scaler(make: Make, save: Save, tmp_path: Path) -> None:
    save(tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = check_equal(make, tmp_path / "model", bf16=True)
    assert trainer.accelerator.scaler is None
    assert trainer.model.get_base_model().streaming.streamed.dtype == torch.bfloat16


def test_an_encoder_decoder_that_is_evaluated_by_what_it_generates(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path / "model")
    generating = {"eval_strategy": "epoch", "predict_with_generate": True, "generation_max_length": 6}
    trainer = check_equal(sequences, tmp_path / "model", **generating)
    assert len(losses(trainer)) == 3
    assert len(trainer.predict(trainer.eval_dataset, max_new_tokens=5).predictions) == 6


@pytest.mark.parametrize(("make", "save"), [(sft, saved("mixtral")), (sequences, saved("t5")), (classes, saved_bert)])
def test_trainers_resume(make: Make, save: Save, tmp_path: Path) -> None:
    save(tmp_path / "model")
    saving = {"save_strategy": "steps", "save_steps": 1}
    torch.manual_seed(0)
    whole = trained(make(streamed_for_training(tmp_path / "model"), tmp_path / "out", **saving))
    again = make(streamed_for_training(tmp_path / "model"), tmp_path / "out", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    resumed = dict(again.model.named_parameters())
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


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
