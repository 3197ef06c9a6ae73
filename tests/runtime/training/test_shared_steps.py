"""The steps of a training that another number of processes goes on with: the same rows in each, or a refusal."""

from pathlib import Path
from typing import Any

import pytest

from helpers.resident_gradients import with_lora
from helpers.tiny_models import causal
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.training import checkpoints, guarded
from onelayer.runtime.training.checkpoints import PROCESSES_FILE, shared_steps
from onelayer.runtime.training.settings import TrainSettings


class Counted(Processes):
    """Processes that agree without being there."""

    def by_first(self, work: Any) -> Any:
        return work()

    def gather(self, value: Any) -> Any:
        return [value, 0.125]


def shared(work: Path, monkeypatch: pytest.MonkeyPatch, count: int, method: str = "sft", **arguments: Any) -> Any:
    """Return the batch size and the batches in a step of each of `count` processes."""
    monkeypatch.setattr(checkpoints, "processes", lambda: Counted(0, count))
    given = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, **arguments}
    found = shared_steps(work, given, method)
    return found["per_device_train_batch_size"], found["gradient_accumulation_steps"]


def test_steps_keep_their_rows_and_no_batch_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice two batches of six rows: the number that began it stays the one that counts."""
    wanted = {2: (6, 2), 1: (6, 4), 3: (4, 2), 4: (6, 1), 8: (3, 1), 24: (1, 1)}
    for count, batches in wanted.items():
        assert shared(tmp_path, monkeypatch, count) == batches
    assert shared(tmp_path, monkeypatch, 2) == (6, 2)


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (5, {}, "begun by 2 processes with 24 rows in a step, which 5 cannot share; start 2 again"),
        (1, {"method": "kto"}, "the loss of kto compares the rows of all processes; start 2 again, or remove"),
        (1, {"dataloader_drop_last": True}, "args.dataloader_drop_last orders its rows for that number"),
        (1, {"train_sampling_strategy": "group_by_length"}, "args.train_sampling_strategy orders its rows"),
        (1, {"spread": True}, "its optimizer is spread over them"),
    ],
)
def test_steps_that_cannot_be_the_same_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, given: dict[str, Any], message: str
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    for name in ("complete", *(() if given.pop("spread", False) else ("optimizer.pt",))):
        (tmp_path / "checkpoint-1" / name).touch()
    assert shared(tmp_path, monkeypatch, 2, **given) == (6, 2)
    assert (tmp_path / PROCESSES_FILE).is_file()
    with pytest.raises(InputError, match=message):
        shared(tmp_path, monkeypatch, count, **given)


@pytest.mark.parametrize("damaged", ["{", "[1]", "{}", '{"processes": 0}', '{"processes": "two"}'])
def test_a_damaged_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    (tmp_path / PROCESSES_FILE).write_text(damaged)
    with pytest.raises(InputError, match=rf"{PROCESSES_FILE}: .*; (write the number|restore the file)"):
        shared(tmp_path, monkeypatch, 2)


@pytest.mark.parametrize("damaged", ["{}", '{"rank": 2}', '{"rank": "half"}'])
def test_a_damaged_rank_is_refused(tmp_path: Path, damaged: str) -> None:
    (tmp_path / guarded.RANK_FILE).write_text(damaged)
    settings = TrainSettings(activations="layer", activation_rank="auto")
    model = with_lora(causal("Llama", num_hidden_layers=1))
    with pytest.raises(InputError, match=f"{guarded.RANK_FILE}: field rank: .*; remove the file to measure the rank"):
        guarded.TrainActivations(model, settings, tmp_path)


@pytest.mark.parametrize(("measured", "used"), [(0.0625, 0.125), (0.5, 0.5), (None, None)])
def test_all_processes_use_the_largest_rank_that_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: float | None, used: float | None
) -> None:
    """None stands for exact activations, which no rank exceeds."""
    monkeypatch.setattr(guarded, "processes", lambda: Counted(0, 2))
    monkeypatch.setattr(guarded, "choose_rank", lambda *arguments: measured)
    settings = TrainSettings(activations="layer", activation_rank="auto")
    activations = guarded.TrainActivations(with_lora(causal("Llama", num_hidden_layers=1)), settings, tmp_path)
    activations.measure_first_batch(lambda: pytest.fail("the rank is measured by another function here"))
    assert read_json(tmp_path / guarded.RANK_FILE)["rank"] == activations._compression.rank == used
