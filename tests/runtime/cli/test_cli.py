"""The command line: the frozen option set, exit codes, one line per mistake, and no torch where none is needed."""

import json
from pathlib import Path
from typing import Any

import pytest

import onelayer.compiler
import onelayer.runtime
from helpers.fake_steps import FakeSteps, write_project
from onelayer.compiler.errors import InputError
from onelayer.runtime.cli.main import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ONELAYER_DEBUG", raising=False)
    return write_project(tmp_path)


@pytest.fixture
def fakes(project: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    return FakeSteps(monkeypatch)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("onelayer: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("bogus", "No such command 'bogus' (see onelayer --help)"),
        ("train", "Missing argument 'EMULATOR' (see onelayer train --help)"),
        ("train e --data d --output o --lerning-rate 1", "--learning-rate"),
        ("train e --data d --output o --seed many", "'--seed'"),
        ("correct a --emulator e --model m --output o --limit x", "neither a number nor `none`"),
        ("compile m --calibration c --output o --memory 1GiB --ratio 0.2", "leave --ratio and --keep-bytes out"),
        ("plan nowhere", "Missing option '--memory'"),
        ("plan nowhere --memory 8GiB", "nowhere"),
        ("train e --data d --output o --columns prompt", "--columns prompt: must look like prompt=question"),
        ("polish --model m --data d --output o --columns promt=x", "promt: unknown column, nearest is `prompt`"),
        ("artifacts", "Missing command"),
        ("artifacts prune", "--older-than-days, --max-size or --keep"),
        ("artifacts prune --max-size 3q", "24GiB"),
        ("run nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("inspect nowhere", "nowhere: no such directory"),
        (f"inspect {__file__}", "test_cli.py: is a file, not a directory; give an emulator"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: str, part: str
) -> None:
    assert call(*arguments.split()) == 2
    assert part in error_line(capsys)


def test_an_input_error_is_one_line_and_exit_2(
    fakes: FakeSteps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise InputError("adapter: trained on\nanother emulator")

    monkeypatch.setitem(onelayer.compiler.__dict__, "merge_adapter", refuse)
    assert call("merge", "adapter", "--model", "m", "--output", "o") == 2
    assert error_line(capsys) == "onelayer: error: adapter: trained on another emulator\n"


def test_any_other_failure_is_one_line_and_exit_1(
    fakes: FakeSteps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_(*args: Any, **settings: Any) -> None:
        raise RuntimeError("disk\nfull")

    monkeypatch.setitem(onelayer.compiler.__dict__, "merge_adapter", break_)
    arguments = ("merge", "adapter", "--model", "m", "--output", "o")
    assert call(*arguments) == 1
    expected = "onelayer: error: RuntimeError: disk full (set ONELAYER_DEBUG=1 for the traceback)\n"
    assert error_line(capsys) == expected
    monkeypatch.setenv("ONELAYER_DEBUG", "1")
    with pytest.raises(RuntimeError, match="disk"):
        main(arguments)


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "--resume"),
        ("merge", "run the same command again"),
        ("compile", "finished layers are kept"),
        ("refine", "finished layers are kept"),
    ],
)
def test_an_interrupt_explains_how_to_resume_and_exits_130(
    fakes: FakeSteps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    advice: str,
) -> None:
    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(onelayer.compiler.__dict__, "merge_adapter", interrupt)
    monkeypatch.setitem(onelayer.runtime.__dict__, "train_lora", interrupt)
    for name in ("compile_emulator", "refine_emulator"):
        monkeypatch.setitem(onelayer.compiler.__dict__, name, interrupt)
    options = {
        "train": ["--data", "d"],
        "merge": ["--model", "m"],
        "compile": ["--calibration", "c"],
        "refine": ["--model", "m", "--calibration", "c"],
    }
    assert call(command, "x", *options[command], "--output", "o") == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("onelayer: interrupted; ")
    assert advice in captured.err


def test_run_prints_steps_scores_and_results(
    project: Path, fakes: FakeSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", project, "--dry-run") == 0
    assert "compile          to run  -      -       -            never ran" in (planned := capsys.readouterr().out)
    assert planned.endswith("6 of 6 steps to run; bytes and peaks are predictions\n")
    assert call("run", project) == 0
    captured = capsys.readouterr()
    assert "[1/6] compile: runs, never ran" in captured.err
    assert "corrected    1     2.7         0.5             10" in captured.out
    assert call("run", project, "--task", "sql", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [step["state"] for step in document["steps"]] == ["cached"] * 4
    figures = {"peak_device_bytes", "promised_bytes"}
    assert set(document["steps"][0]) == {"name", "kind", "state", "reason", "key", "path", *figures}
    assert [row["name"] for row in document["evaluations"]["sql"]] == ["original", "uncorrected", "corrected"]


def test_a_failed_task_ends_in_exit_1_and_names_the_error(
    project: Path, fakes: FakeSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.fail["sql"] = MemoryError("out of memory")
    assert call("run", project, "--json") == 1
    captured = capsys.readouterr()
    assert {step["name"]: step["state"] for step in json.loads(captured.out)["steps"]}["support.correct"] == "ran"
    assert captured.err.splitlines()[-1] == "onelayer: error: sql.train: MemoryError: out of memory"


def test_output_of_libraries_does_not_reach_stdout(
    fakes: FakeSteps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(*args: Any, **settings: Any) -> dict[str, Any]:
        print("{'loss': 1.0}")
        return {"output": "o", "report": {"seconds": 1.5}}

    monkeypatch.setitem(onelayer.compiler.__dict__, "merge_adapter", chatty)
    assert call("merge", "a", "--model", "m", "--output", "o", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"output": "o", "report": {"seconds": 1.5}}
    assert "loss" in captured.err


def test_artifacts_are_listed_verified_and_pruned(
    project: Path, fakes: FakeSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", project) == 0
    capsys.readouterr()
    assert call("artifacts", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert all(row["used_by"] and row["age_seconds"] >= 0 for row in listed)
    assert sorted(row["kind"] for row in listed) == ["compile", "correct", "correct", "evaluate", "train", "train"]
    assert call("artifacts", "verify") == 0
    adapter = next(row["key"] for row in listed if row["kind"] == "train")
    (project.parent / "home" / "artifacts" / adapter / "payload" / "adapter_model.safetensors").write_bytes(b"x")
    capsys.readouterr()
    assert call("artifacts", "verify") == 1
    assert f"{adapter[:12]} (train): adapter_model.safetensors changed" in capsys.readouterr().out
    assert call("artifacts", "prune", "--keep", project, "--dry-run") == 0
    assert "0 artifacts would be removed" in capsys.readouterr().out
    assert call("artifacts", "prune", "--max-size", "0") == 0
    assert "6 artifacts removed" in capsys.readouterr().out
    assert call("artifacts", "list") == 0
    assert capsys.readouterr().out == "the store is empty\n"
