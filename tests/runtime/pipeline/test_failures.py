"""The cost of a failure, an interrupt, a concurrent run or a damaged store, with stand-ins for the steps."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onelayer.compiler
import onelayer.runtime
from helpers.fake_steps import FakeSteps, Project
from onelayer.compiler.errors import InputError
from onelayer.runtime.pipeline.housekeeping import reachable_keys
from onelayer.runtime.pipeline.run import RunResult, run
from onelayer.runtime.store.prune import prune
from onelayer.runtime.store.store import ArtifactStore

ALL = ["compile", "train sql", "correct", "evaluate 2", "train support", "correct"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return Project(tmp_path, FakeSteps(monkeypatch))


def states(result: RunResult) -> dict[str, str]:
    return {step.name: step.state for step in result.steps}


def test_a_failing_task_does_not_stop_the_others(project: Project) -> None:
    project.fakes.fail["sql"] = MemoryError("out of memory")
    messages: list[str] = []
    result = run(project.manifest, project.store, notify=messages.append)
    assert states(result) == {
        "compile": "ran",
        "sql.train": "failed",
        "sql.correct": "skipped",
        "sql.evaluate": "skipped",
        "support.train": "ran",
        "support.correct": "ran",
    }
    assert [step.reason for step in result.failed] == ["MemoryError: out of memory"]
    assert "[2/6] sql.train: failed, MemoryError: out of memory" in messages
    project.fakes.fail.clear()
    project.fakes.taken()
    assert project.run() == ["train sql", "correct", "evaluate 2"]


def test_direct_training_that_does_not_fit_costs_only_itself(project: Project) -> None:
    project.edit("version: 1", "version: 1\ndirect: true")
    project.fakes.fail["sql direct"] = MemoryError("too large")
    result = run(project.manifest, project.store, ["sql"])
    assert states(result)["sql.direct"] == "failed"
    assert [row["name"] for row in result.evaluations["sql"]] == ["original", "uncorrected", "corrected"]


def test_an_interrupt_keeps_what_is_finished(project: Project) -> None:
    project.fakes.fail["support"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(project.manifest, project.store)
    assert project.fakes.taken() == ALL[:5]
    project.fakes.fail.clear()
    assert project.run() == ALL[4:]


@pytest.mark.parametrize("moment", ["before its step", "while its step runs", "and is restored"])
def test_data_that_change_in_a_run_never_enter_under_the_old_key(
    project: Project, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    file = project.folder / "sql.jsonl"
    before = file.read_text()
    real: dict[str, Callable[..., Any]] = {
        "compile": project.fakes.compile_emulator,
        "train": project.fakes.train_lora,
    }

    def changing(step: str) -> Callable[..., Any]:
        def execute(*arguments: Any, **settings: Any) -> Any:
            file.write_text('{"text": "something else"}\n')
            result = real[step](*arguments, **settings)
            if moment == "and is restored":
                file.write_text(before)
            return result

        return execute

    if moment == "before its step":
        monkeypatch.setitem(onelayer.compiler.__dict__, "compile_emulator", changing("compile"))
    else:
        monkeypatch.setitem(onelayer.runtime.__dict__, "train_lora", changing("train"))
    result = run(project.manifest, project.store, ["sql"])
    assert states(result)["sql.train"] == "failed"
    assert "sql.jsonl: changed " in result.failed[0].reason
    assert {artifact.kind for artifact in project.store.artifacts()} == {"compile"}


def test_a_broken_model_is_refused_before_anything_runs(project: Project) -> None:
    (project.folder / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model"):
        run(project.manifest, project.store)
    assert project.fakes.taken() == []


def test_two_runs_at_once_do_each_step_once(project: Project) -> None:
    results: list[RunResult] = []
    threads = [
        threading.Thread(target=lambda: results.append(run(project.manifest, ArtifactStore(project.store.home))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(project.fakes.taken()) == sorted(ALL)
    first, second = results
    assert {step.key for step in first.steps} == {step.key for step in second.steps}
    assert not first.failed + second.failed


def test_prune_keeps_what_a_manifest_reaches(project: Project) -> None:
    project.run()
    project.edit("learning_rate: 1e-4", "learning_rate: 2e-4")
    project.run()
    removed = prune(project.store, keep=reachable_keys(project.manifest, project.store)).removed
    assert len(removed) == 5  # the steps of the first learning rate
    assert project.run() == []


def test_a_damaged_record_only_costs_the_explanation(project: Project) -> None:
    project.run()
    for file in (project.store.home / "runs").glob("*.json"):
        file.write_text("[]")
    project.append("sql.jsonl")
    assert project.reasons()["sql.train"] == "to run: never ran"
    assert project.run() == ["train sql", "correct", "evaluate 2"]


def test_a_plan_does_not_download_a_missing_hub_model(project: Project) -> None:
    project.edit("path: model", "path: onelayer-tests/no-such-model")
    reasons = project.reasons()
    assert reasons["compile"] == "to run: never ran; after the model onelayer-tests/no-such-model is downloaded"
    assert reasons["sql.train"] == "to run: never ran; after compile"
