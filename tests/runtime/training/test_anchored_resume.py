"""An anchored training that is killed, stopped or starved of disk at any moment ends in the bytes of a calm one."""

import errno
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.children import at_call, killed_at
from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.runtime import train_lora
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.anchors.stream import OffsetStream
from onelayer.runtime.training import adapter_directory, callbacks
from onelayer.runtime.training.trainers import LoraTrainer

# Six rows make three steps of an epoch. Renewals come before steps 1, 3 (one step), 4 and 6, of six.
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 1,
    "gradient_accumulation": 2,
    "lora_rank": 4,
    "target_modules": ["q_proj", "down_proj"],
    "learning_rate": 1e-2,
    "lora": {"lora_dropout": 0.3},
    "args": {"save_steps": 1},
    "anchor_every": 2,
}
# One after the other, each resumed from what the one before left: an object's function, and the call of it in a run
# (from 1) that does not return. Two units run for each batch of a renewal.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "while batches are drawn ahead": (DataLoader, "__iter__", 1),
    "in the first unit of the first renewal": (OffsetStream, "run_unit", 1),
    "in the last unit of the first renewal": (OffsetStream, "run_unit", 8),
    "between anchoring and training": (Anchors, "next_batch", 1),
    "in the second step": (LoraTrainer, "training_step", 3),
    "before the second step counts": (torch.optim.AdamW, "step", 1),
    "while the second checkpoint is written": (LoraTrainer, "_save_rng_state", 1),
    "before the second checkpoint is marked": (callbacks, "mark_complete", 1),
    "in the first unit of the second renewal": (OffsetStream, "run_unit", 5),
    "in the first unit of the second epoch": (OffsetStream, "run_unit", 5),
    "when the last step is saved": (callbacks.Progress, "on_train_end", 1),
    "while the adapter is written": (adapter_directory, "write_text", 1),
}


class KilledError(BaseException):
    """Stands for the power going off."""


def killed(moment: str) -> None:
    raise KilledError(moment)


def anchored(place: Path, output: Path, **settings: Any) -> Any:
    data, chosen = place / "text.jsonl", {**SETTINGS, "resume": True, **settings}
    return train_lora(place / "half", data, output, model=place / "original", **chosen)


@pytest.fixture(scope="module")
def calm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("calm") / "adapter"
    anchored(place, output)
    return output


def test_killed_at_every_moment_it_ends_in_the_same_bytes(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in MOMENTS:
        with monkeypatch.context() as patch:
            patch.setattr(*MOMENTS[moment][:2], at_call(*MOMENTS[moment], partial(killed, moment)))
            with pytest.raises(KilledError, match=moment):
                anchored(place, tmp_path / "out")
        assert not (tmp_path / "out").exists(), moment
    anchored(place, tmp_path / "out")
    assert adapter_digest(tmp_path / "out") == adapter_digest(calm)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("place_of_stop", "call", "step"),
    [(LoraTrainer, 1, 1), (OffsetStream, 20, 3)],
    ids=["in a step", "in an epoch's renewal"],
)
def test_a_stop_is_saved_and_goes_on_to_the_same_bytes(
    place: Path,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place_of_stop: Any,
    call: int,
    step: int,
) -> None:
    name = "training_step" if place_of_stop is LoraTrainer else "run_unit"
    stop = at_call(place_of_stop, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(place_of_stop, name, stop)
        with pytest.raises(KeyboardInterrupt):
            anchored(place, tmp_path / "out", args={"save_steps": 100})
    assert f"stopped after step {step} of 6; checkpoint-{step} is saved" in capsys.readouterr().err
    anchored(place, tmp_path / "out", args={"save_steps": 100})
    assert adapter_digest(tmp_path / "out") == adapter_digest(calm)


def test_a_killed_process_is_resumed_to_the_same_bytes(
    place: Path, calm: Path, tmp_path: Path, own_store: Path
) -> None:
    how = {"place": place, "output": tmp_path / "out"}
    killed_at((OffsetStream, "run_unit", 15), anchored, how, str(own_store))
    anchored(**how)
    assert adapter_digest(tmp_path / "out") == adapter_digest(calm)


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")  # what torch says then


def test_a_full_disk_says_so_and_loses_nothing(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("onelayer.compiler.streaming.spill.SMALLEST_BYTES", 1)
        patch.setattr(
            SpillPool, "_spill", at_call(SpillPool, "_spill", 60, lambda: patch.setattr(os, "posix_fallocate", full))
        )
        with pytest.raises(OSError, match=r"the disk is full.*make room, or set ONELAYER_HOME"):
            anchored(place, tmp_path / "out")
    saved = list((tmp_path / ".out.training").glob("checkpoint-*"))
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "_save_rng_state", at_call(LoraTrainer, "_save_rng_state", 1, broken))
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(OSError, match=r"out.training: the disk is full, the checkpoint of step \d.*--resume"):
            anchored(place, tmp_path / "out")
    assert saved
    anchored(place, tmp_path / "out")
    assert adapter_digest(tmp_path / "out") == adapter_digest(calm)
