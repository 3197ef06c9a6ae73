"""What surrounds a training: scores on validation data, files of reporting tools, the reference of preferences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onelayer.runtime
from helpers.fake_steps import FakeSteps, Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return Project(tmp_path, FakeSteps(monkeypatch))


def test_validation_data_are_scored_while_training_and_enter_no_key(project: Project) -> None:
    project.edit("test: test.jsonl}", "validation: test.jsonl, test: test.jsonl}")
    project.run(["sql"])
    assert "eval_data" not in project.fakes.arguments["train sql"]
    project.edit("sql: {", "sql: {args: {eval_steps: 2}, ")
    assert project.run(["sql"]) == []
    project.edit("learning_rate: 1e-4", "learning_rate: 2e-4")
    project.run(["sql"])
    assert project.fakes.arguments["train sql"]["eval_data"] == str(project.folder / "test.jsonl")
    assert project.fakes.arguments["train sql"]["args"]["eval_steps"] == 2


def test_files_of_reporting_tools_end_in_the_output(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = project.fakes.train_lora

    def reporting(emulator: Path, data: str, output: Path, **settings: Any) -> Any:
        done = real(emulator, data, output, **settings)
        (output / "runs" / "now").mkdir(parents=True)
        (output / "runs" / "now" / "events").write_text("loss")
        return done

    monkeypatch.setitem(onelayer.runtime.__dict__, "train_lora", reporting)
    project.edit("version: 1", "version: 1\noutput: out")
    project.run(["sql"])
    assert (project.folder / "out" / "sql-train-runs" / "now" / "events").read_text() == "loss"
    assert not (project.folder / "out" / "sql-adapter").exists()


def test_preferences_have_a_reference_of_their_own(project: Project) -> None:
    project.run(["sql"])
    project.edit("train: {lora: {r: 8}", "train: {method: dpo, lora: {r: 8}")
    assert project.run(["sql"]) == ["reference", "train sql"]
    given = project.fakes.arguments
    assert (given["reference"]["method"], given["reference"]["max_length"]) == ("dpo", 512)
    assert (given["train sql"]["method"], given["train sql"]["reference"].is_dir()) == ("dpo", True)
    project.edit("max_steps: 5", "max_steps: 6, per_device_train_batch_size: 2")
    assert project.run(["sql"]) == ["train sql"]
    project.edit("method: dpo", "method: kto")
    assert "reference" in project.run(["sql"])
    project.edit("per_device_train_batch_size: 2", "per_device_train_batch_size: 4")
    assert "reference" in project.run(["sql"])  # KTO compares the answers of one batch
