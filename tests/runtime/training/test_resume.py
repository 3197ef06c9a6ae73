"""A training that is killed, stopped or starved of disk at any moment goes on and ends in the same bytes."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.runtime import TrainResult, train_lora
from onelayer.runtime.training import adapter_directory, callbacks
from onelayer.runtime.training.trainers import LoraTrainer

Train = Callable[..., TrainResult]
# Six rows in batches of two: an epoch has three steps, so four steps end inside one.
LENGTHS: dict[str, dict[str, Any]] = {
    "inside an epoch": {"max_steps": 4},
    "after an epoch": {"max_steps": None, "epochs": 1},
}


class KilledError(BaseException):
    """Stands for the power going off."""


def full_disk(*arguments: Any, **keywords: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(*arguments: Any, **keywords: Any) -> Any:
    raise KilledError


# Where the run stops: an object's function, and the call of it (from 1) that does not return.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in the second step": (LoraTrainer, "training_step", 2),
    "while the second checkpoint is written": (LoraTrainer, "_save_rng_state", 2),
    "before a checkpoint is marked": (callbacks, "mark_complete", 2),
    "when the last step is saved": (callbacks.Progress, "on_train_end", 1),
    "after the last step": (adapter_directory, "write_adapter_directory", 1),
    "while the adapter is written": (adapter_directory, "write_text", 1),
}


def record(directory: Path) -> dict[str, Any]:
    """The adapter's provenance without what was measured with a clock."""
    document: dict[str, Any] = json.loads((directory / "onelayer.json").read_text())
    for name in ("seconds", "peak_device_bytes"):
        del document["training"][name]
    return document


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root: Path = tmp_path_factory.mktemp("undisturbed")
    made: dict[str, Path] = {}

    def run(length: str) -> Path:
        if length not in made:
            made[length] = root / length.replace(" ", "-")
            train_lora(place / "half", place / "text.jsonl", made[length], **settings(length))
        return made[length]

    return run


def settings(length: str) -> dict[str, Any]:
    small = {"batch_size": 2, "lora_rank": 4, "target_modules": ["q_proj", "down_proj"]}
    return {**small, **LENGTHS[length], "lora": {"lora_dropout": 0.3}, "args": {"save_steps": 1}}


def stop_at(monkeypatch: pytest.MonkeyPatch, moment: str, stop: Callable[..., Any]) -> None:
    where, name, call = MOMENTS[moment]
    real, calls = getattr(where, name), []

    def function(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return stop() if len(calls) == call else real(*arguments, **keywords)

    monkeypatch.setattr(where, name, function)


@pytest.mark.parametrize(
    ("length", "moment"),
    [
        *(("inside an epoch", moment) for moment in MOMENTS),
        ("after an epoch", "when the last step is saved"),
    ],
)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], Path],
    length: str,
    moment: str,
) -> None:
    wanted = undisturbed(length)
    stop = full_disk if "written" in moment else killed
    with monkeypatch.context() as patch:
        stop_at(patch, moment, stop)
        with pytest.raises((KilledError, OSError)):
            train_lora(place / "half", place / "text.jsonl", tmp_path / "out", **settings(length))
    assert not (tmp_path / "out").exists()
    result = train_lora(place / "half", place / "text.jsonl", tmp_path / "out", **settings(length), resume=True)
    assert adapter_digest(tmp_path / "out") == adapter_digest(wanted)
    assert record(tmp_path / "out") == record(wanted)
    assert result.steps == record(wanted)["training"]["steps"]
    assert not list(tmp_path.glob(".*"))


def test_figures_of_compressed_activations_survive(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {**settings("after an epoch"), "activations": "layer", "activation_rank": "auto"}
    data = {"emulator": place / "half", "data": place / "text.jsonl", **choices, "activation_report": True}
    train_lora(output=tmp_path / "calm", **data)
    for moment in ("in the second step", "after the last step"):
        with monkeypatch.context() as patch:
            stop_at(patch, moment, killed)
            with pytest.raises(KilledError):
                train_lora(output=tmp_path / "out", resume=True, **data)
    train_lora(output=tmp_path / "out", resume=True, **data)
    assert adapter_digest(tmp_path / "out") == adapter_digest(tmp_path / "calm")
    assert record(tmp_path / "out") == record(tmp_path / "calm")


def test_a_second_training_to_the_same_output_is_refused(
    train: Train, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LoraTrainer.training_step
    refused: list[InputError] = []

    def meeting(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if not refused:
            with pytest.raises(InputError, match="another process is at work on it now") as caught:
                train_lora(place / "half", place / "text.jsonl", tmp_path / "adapter", max_steps=1, resume=True)
            refused.append(caught.value)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(LoraTrainer, "training_step", meeting)
    train()
    assert len(refused) == 1
    assert (tmp_path / "adapter").exists()
