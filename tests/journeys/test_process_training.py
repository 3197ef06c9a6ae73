"""Training in several processes: it is that of one, it publishes one adapter, and another number of them goes on."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser  # type: ignore[import-untyped]
from accelerate.utils.launch import prepare_multi_gpu_env  # type: ignore[import-untyped]

from helpers.children import at_call, interrupt
from helpers.launched import launch, options, written
from helpers.launched_work import Fault, run_with_environment, run_with_fault
from helpers.tiny_models import save_tiny
from onelayer.compiler import compile_emulator
from onelayer.compiler.adapters.reader import Adapter
from onelayer.runtime import train_lora
from onelayer.runtime.training.trainers import LoraTrainer

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" + " again" * (count % 3) for count in range(8)]
PAIRS = [{"prompt": text, "chosen": " it is five", "rejected": " rome"} for text in TEXTS]
# Eight rows, four in a step, so that an epoch has two steps: otherwise the last step of an epoch would take some rows
# twice in several processes.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"max_length": 64, "lora_rank": 2, "learning_rate": 0.01, "save_steps": 1, "epochs": 2},
}
METHODS["anchored"] = {**METHODS["plain"], "anchor_every": 3, "anchor_bits": 32}
METHODS["anchored dpo"] = {**METHODS["anchored"], "method": "dpo"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its emulator and data."""
    path: Path = tmp_path_factory.mktemp("trained")
    save_tiny("llama", path / "model")
    written(path / "data.jsonl", [{"text": text} for text in TEXTS])
    written(path / "pairs.jsonl", PAIRS)
    compile_emulator(path / "model", path / "data.jsonl", path / "emulator", max_length=16, keep_bytes=0.4)
    return path


def given(place: Path, method: str) -> dict[str, Any]:
    """Return what a training is given by name, but for its output and its batches."""
    model = {"model": place / "model"} if method.startswith("anchored") else {}
    return {"data": place / ("pairs.jsonl" if "dpo" in method else "data.jsonl"), **model, **METHODS[method]}


def training(adapter: Path) -> dict[str, Any]:
    """Return the figures of a training."""
    figures: dict[str, Any] = json.loads((adapter / "onelayer.json").read_text())["training"]
    return figures


@pytest.fixture(scope="module")
def of_one(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The figures of each training in one process."""
    root, found = tmp_path_factory.mktemp("of one"), dict[str, dict[str, Any]]()

    def figures(method: str) -> dict[str, Any]:
        if method not in found:
            train_lora(place / "emulator", output=root / method, batch_size=4, **given(place, method))
            found[method] = training(root / method)
        return found[method]

    return figures


def losses(figures: dict[str, Any]) -> Any:
    """Return the losses of all steps, equal to others up to the rounding of their sums."""
    return pytest.approx([loss for _, loss in figures["losses"]], rel=1e-4)


def accelerated(count: int) -> dict[str, str]:
    """The variables that `accelerate launch` sets for its processes."""
    given = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    chosen = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    found: dict[str, str] = prepare_multi_gpu_env(
        launch_command_parser().parse_args([*given, *chosen, "--module", "onelayer.runtime"])
    )
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_training_in_two_processes_publishes_one_adapter(place: Path, tmp_path: Path, launcher: str) -> None:
    sizes = options(batch_size=2, max_length=16, max_steps=2, lora_rank=2)
    command = ["train", place / "emulator", "--data", place / "data.jsonl", "--output", tmp_path / "adapter", *sizes]
    variables = accelerated(2) if launcher == "accelerate launch" else {}
    assert bool(variables) == (launcher == "accelerate launch")
    launched = launch(2, [json.dumps(variables), *command, "--json"], tmp_path / "logs", work=run_with_environment)
    assert launched.codes == [0, 0], launched.printed
    assert launched.printed.count('"train_loss"') == 1
    assert len(Adapter.open(tmp_path / "adapter").modules) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "logs"}


@pytest.mark.parametrize(("method", "count"), [("anchored", 4), ("anchored dpo", 2)])
def test_anchored_training_in_processes_is_that_of_one(
    place: Path, tmp_path: Path, of_one: Callable[[str], dict[str, Any]], method: str, count: int
) -> None:
    """Each process anchors its own rows: its share of each step's four, which are one batch in one process."""
    fields = options(**given(place, method), output=tmp_path / "out", batch_size=4 // count)
    launched = launch(count, ["train", place / "emulator", *fields], tmp_path / "logs")
    assert set(launched.codes) == {0}, launched.printed
    one, more = of_one(method), training(tmp_path / "out")
    assert [loss for _, loss in more["losses"]] == losses(one)
    assert one["losses"][3] != one["losses"][0]
    # Each process reads the original once for each renewal.
    assert more["anchors"]["renewals"] == one["anchors"]["renewals"] == 2
    assert more["anchors"]["bytes_read"] == pytest.approx(one["anchors"]["bytes_read"], rel=0.05)
    assert more["anchors"]["offset_bytes"] < one["anchors"]["offset_bytes"]


@pytest.mark.parametrize("method", ["plain", "anchored"])
@pytest.mark.parametrize(("begun", "count"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_a_killed_training(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_one: Callable[[str], dict[str, Any]],
    begun: int,
    count: int,
    method: str,
) -> None:
    """It ends in the middle of an epoch. The steps after it are those of four rows too."""
    fields = {**given(place, method), "output": tmp_path / "out", "batch_size": 4 // begun}
    command = ["train", place / "emulator", *options(**fields)]
    if begun == 1:
        with monkeypatch.context() as patch:
            patch.setattr(LoraTrainer, "training_step", at_call(LoraTrainer, "training_step", 2, interrupt))
            with pytest.raises(KeyboardInterrupt):
                train_lora(place / "emulator", **fields)
        ended = launch(count, [*command, "--resume"], tmp_path / "logs")
        assert set(ended.codes) == {0}, ended.printed
        assert (
            ended.printed.count(
                "begun by 1 process; 2 processes now take the same 4 rows in each step, in batches of 2"
            )
            == 1
        )
    else:
        fault = Fault(1, "SIGKILL", "onelayer.runtime.training.trainers:LoraTrainer", "training_step", 2)
        killed = launch(begun, [json.dumps(asdict(fault)), *command], tmp_path / "logs", work=run_with_fault)
        assert killed.codes[1] == -9, killed.printed
        train_lora(place / "emulator", **fields, resume=True)
    assert [path.name for path in tmp_path.glob(".out*")] == []
    assert [loss for _, loss in training(tmp_path / "out")["losses"]] == losses(of_one(method))
