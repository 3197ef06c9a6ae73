"""Several processes, as `torchrun` starts them: training publishes, and failures are one line."""

import json
from pathlib import Path

import pytest

from helpers.launched import launch
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters.reader import Adapter

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" for count in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its emulator and data."""
    path: Path = tmp_path_factory.mktemp("processes")
    model = save_tiny("llama", path / "model")
    write_emulator(model, path / "model", path / "emulator", ratio=0.5)
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def test_training_in_two_processes_publishes_one_adapter(place: Path, tmp_path: Path) -> None:
    sizes = ["--batch-size", "2", "--max-length", "16", "--max-steps", "3", "--lora-rank", "2"]
    command = ["train", place / "emulator", "--data", place / "data.jsonl", "--output", tmp_path / "adapter", *sizes]
    launched = launch(2, [*command, "--json"], tmp_path / "logs")
    assert launched.codes == [0, 0], launched.printed
    assert launched.printed.count('"train_loss"') == 1
    assert len(Adapter.open(tmp_path / "adapter").modules) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "logs"}


def test_anchored_training_in_two_processes_is_that_of_one(place: Path, tmp_path: Path) -> None:
    """Each process anchors its own rows: half of each step's, whose batch is twice as large in one process."""
    sizes = ["--max-length", "16", "--max-steps", "4", "--lora-rank", "2", "--learning-rate", "0.01"]
    anchor = ["--model", place / "model", "--anchor-every", "3", "--anchor-bits", "32"]
    found = []
    for count in (1, 2):
        command = ["train", place / "emulator", "--data", place / "data.jsonl", "--output", tmp_path / f"of {count}"]
        launched = launch(count, [*command, *sizes, *anchor, "--batch-size", 4 // count], tmp_path / f"logs {count}")
        assert launched.codes == [0] * count, launched.printed
        found.append(json.loads((tmp_path / f"of {count}" / "onelayer.json").read_text())["training"])
    one, two = found
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=1e-4)
    assert one["losses"][3] != one["losses"][0]
    # Each epoch has two steps. Each process reads the original once for each renewal.
    assert two["anchors"]["renewals"] == one["anchors"]["renewals"] == 2
    assert two["anchors"]["bytes_read"] == pytest.approx(one["anchors"]["bytes_read"], rel=0.05)
    assert two["anchors"]["offset_bytes"] < one["anchors"]["offset_bytes"]


def test_bad_input_is_one_line_whatever_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    command = ["evaluate", place / "nowhere", "--data", place / "data.jsonl"]
    launched = launch(2, command, tmp_path / "logs")
    assert launched.codes == [2, 2]
    assert launched.printed.count("onelayer: error") == 1
    refused = launch(
        2, ["slice", place / "emulator", "--ratio", "0.2", "--output", tmp_path / "out"], tmp_path / "more"
    )
    assert refused.codes == [2, 2]
    assert "start it without torchrun" in refused.printed
