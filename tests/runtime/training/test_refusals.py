"""Training refuses what cannot work, in one line and before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_tiny
from onelayer.compiler.errors import InputError
from onelayer.runtime import TrainResult, train_lora

Train = Callable[..., TrainResult]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": {"lr_scheduler_type": "sawtooth"}}, "sawtooth"),
        ({"target_modules": ["qproj"]}, "qproj"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"data": "absent"}, r"absent\.jsonl"),
        ({"sample_prompt": ["a dog"]}, "--sample-prompt: .* draws no pictures; leave it out"),
        ({"max_length": 2, "data": "pairs"}, "no example has a labeled token"),
    ],
)
def test_refusals(train: Train, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(**settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_porj"], "v_porj: unknown module, nearest is `v_proj`"),
        (r".*\.(q|v)_porj", "matches the name of no module"),
        ("(", "is no regular expression"),
        ("all-liner", "matches the name of no module"),
    ],
)
def test_wrong_target_modules_are_named_before_loading(
    train: Train, monkeypatch: pytest.MonkeyPatch, targets: Any, message: str
) -> None:
    monkeypatch.setattr("onelayer.runtime.training.inputs.TrainModel.load", lambda model: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        train(target_modules=targets)


def test_texts_beyond_the_positions_are_refused(train: Train, place: Path) -> None:
    (place / "endless.jsonl").write_text(json.dumps({"text": "the sum " * 100}) + "\n")
    with pytest.raises(InputError, match="positions for 128; set max_length to 128"):
        train(data="endless", max_length=400)


def test_models_that_are_not_causal_are_refused(place: Path, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    with pytest.raises(InputError, match="BertForMaskedLM is not a language model"):
        train_lora(tmp_path / "bert", place / "text.jsonl", tmp_path / "adapter")


def test_an_output_with_files_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds files"):
        train()


def test_without_the_training_extra_the_remedy_is_named(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onelayer.runtime.training.train.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'onelayer\[train\]'"):
        train()
