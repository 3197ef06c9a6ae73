"""The parts around TRL's trainer: counting saved bytes, finding the checkpoint to continue from, the mean loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from onelayer.runtime.activations.figures import SavedBytes
from onelayer.runtime.training import callbacks, checkpoints


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedBytes(layer) as saved:
        h = layer(x)  # saves x, and the weight, which is resident
        (h * h).sum()  # saves h, twice
    assert saved.total() == 2 * 4 * 8 * 4


def test_steps_are_told_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("onelayer.compiler.machine.console.LINE_SECONDS", -1.0)
    progress: Any = callbacks.Progress()
    state = TrainerState(max_steps=4)
    progress.on_train_begin(None, state, None)
    state.global_step = 2
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 1.5})
    progress.on_train_end(None, state, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("onelayer: train: 2 of 4 steps, loss 1.5000, 00:00 elapsed, about ")


def test_the_newest_complete_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path) is None
    for step in (20, 100, 300):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whole")
    for step in (20, 100):
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("damage", ["removed", "changed", "mark"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/weights").write_text("whole")
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    if damage == "removed":  # killed while an old checkpoint was removed
        (tmp_path / "checkpoint-2/weights").unlink()
    elif damage == "changed":
        (tmp_path / "checkpoint-2/weights").write_text("whol\0")
    else:
        (tmp_path / "checkpoint-2" / checkpoints.COMPLETE_FILE).write_text("2\n")
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_the_mean_loss_weighs_entries_by_their_steps() -> None:
    history = [{"step": 2, "loss": 3.0}, {"step": 3, "loss": 6.0}, {"step": 3, "train_runtime": 1.0}]
    assert callbacks.mean_loss(history) == pytest.approx((2 * 3.0 + 6.0) / 3)
