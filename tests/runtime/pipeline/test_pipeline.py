"""The pipeline: what runs, what does not, and why, with stand-ins for the steps themselves."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.fake_steps import FakeSteps, Project, write_model
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.kinds import STEP_KINDS
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.pipeline.step import Source, source_digest
from onelayer.runtime.store.prune import prune

ALL = ["compile", "train sql", "correct", "evaluate 2", "train support", "correct"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return Project(tmp_path, FakeSteps(monkeypatch))


def test_cold_then_nothing(project: Project) -> None:
    assert project.run() == ALL
    assert project.run() == []


def test_a_cold_plan_names_what_waits_for_what(project: Project) -> None:
    assert project.reasons() == {
        "compile": "to run: never ran",
        "sql.train": "to run: never ran; after compile",
        "sql.correct": "to run: never ran; after compile, sql.train",
        "sql.evaluate": "to run: never ran; after sql.train, sql.correct",
        "support.train": "to run: never ran; after compile",
        "support.correct": "to run: never ran; after compile, support.train",
    }
    first, second, *_ = plan(project.manifest, project.store).steps
    assert first.key is not None
    assert (second.key, second.path) == (None, None)
    assert not project.store.root.exists()  # a plan writes nothing


def test_touching_files_changes_nothing(project: Project) -> None:
    project.run()
    for file in [*project.folder.glob("*.jsonl"), *(project.folder / "model").iterdir()]:
        os.utime(file, (1, 1))
    assert project.run() == []


def test_moving_the_model_changes_nothing(project: Project) -> None:
    project.run()
    (project.folder / "model").rename(project.folder / "elsewhere")
    project.edit("path: model", "path: elsewhere")
    assert project.run() == []


def test_edited_training_data_runs_its_task_again(project: Project) -> None:
    project.run()
    project.append("sql.jsonl")
    assert project.reasons()["sql.train"] == "to run: the data file sql.jsonl changed"
    assert project.reasons()["sql.correct"] == "to run: after sql.train"
    assert project.reasons()["support.train"].startswith("cached")
    assert project.run() == ["train sql", "correct", "evaluate 2"]


def test_edited_test_data_only_scores_again(project: Project) -> None:
    project.run()
    project.append("test.jsonl")
    assert project.reasons()["sql.evaluate"] == "to run: the data file test.jsonl changed"
    assert project.run() == ["evaluate 2"]


def test_an_identical_emulator_trains_nothing_again(project: Project) -> None:
    project.run()
    project.append("mix.jsonl")  # the stand-in reads only the first line
    assert project.reasons()["compile"] == "to run: the data file mix.jsonl changed"
    assert project.run() == ["compile"]
    assert project.run() == []


def test_another_emulator_trains_again(project: Project) -> None:
    project.run()
    project.edit("ratio: 0.25", "ratio: 0.5")
    assert project.reasons()["compile"] == "to run: field ratio 0.25 -> 0.5"
    assert project.run() == ALL
    assert "sql.train" in project.reasons()


def test_another_original_runs_everything(project: Project) -> None:
    project.run()
    for file in (project.folder / "model").iterdir():
        file.unlink()
    (project.folder / "model").rmdir()
    write_model(project.folder / "model", "another original")
    assert project.reasons()["compile"] == f"to run: the model {project.folder / 'model'} changed"
    assert project.run() == ALL


def test_another_chat_template_is_another_model(project: Project) -> None:
    project.run()
    (project.folder / "model" / "README.md").write_text("about this model")
    assert project.run() == []
    (project.folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert "the model" in project.reasons()["compile"]


def test_a_changed_setting_is_named_and_going_back_is_free(project: Project) -> None:
    project.run()
    project.edit("learning_rate: 1e-4", "learning_rate: 2e-4")
    assert project.reasons()["support.train"] == "to run: field learning_rate 0.0001 -> 0.0002"
    assert project.run() == ["train sql", "correct", "evaluate 2", "train support", "correct"]
    project.edit("learning_rate: 2e-4", "learning_rate: 1e-4")
    assert project.run() == []


def test_an_override_changes_only_its_task(project: Project) -> None:
    project.run()
    project.edit("support: {train: support.jsonl", "support: {train: support.jsonl, lora: {r: 4}")
    assert project.reasons()["support.train"] == "to run: field r 8 -> 4"
    assert project.run() == ["train support", "correct"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_steps: 5", "max_steps: 5, logging_steps: 1, report_to: none"),
        ("version: 1", "version: 1\nstream: {batch_size: 4}"),
    ],
)
def test_settings_that_cannot_change_a_result_run_nothing(project: Project, old: str, new: str) -> None:
    project.run()
    project.edit(old, new)
    assert project.run() == []


def test_a_limit_corrects_again_and_trains_nothing(project: Project) -> None:
    project.run()
    project.edit("version: 1", "version: 1\ncorrect: {limit: none}")
    assert project.reasons()["sql.correct"] == "to run: field limit 3.0 -> None"
    assert project.run() == ["correct", "evaluate 2", "correct"]


def test_a_step_version_is_a_reason(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run()
    now = STEP_KINDS["correct"]
    monkeypatch.setitem(STEP_KINDS, "correct", replace(now, version=99))
    assert project.reasons()["sql.correct"] == f"to run: step version changed {now.version} -> 99"
    assert project.run() == ["correct", "correct"]  # an identical result is not scored again


def test_a_tampered_adapter_is_made_again_alone(project: Project) -> None:
    project.run()
    path = next(step.path for step in plan(project.manifest, project.store).steps if step.name == "sql.train")
    (Path(str(path)) / "adapter_model.safetensors").write_bytes(b"tampered")
    reason = "to run: artifact damaged: adapter_model.safetensors changed since it was written"
    assert project.reasons()["sql.train"] == reason
    assert project.run() == ["train sql"]
    assert project.store.verify() == []


def test_a_pruned_artifact_is_named(project: Project) -> None:
    project.run()
    prune(project.store, keep=set())
    assert project.reasons()["compile"] == "to run: its artifact is no longer in the store"


def test_tasks_are_chosen_by_name_and_share_the_emulator(project: Project) -> None:
    assert project.run(["support"]) == ["compile", "train support", "correct"]
    assert project.run() == ["train sql", "correct", "evaluate 2"]
    with pytest.raises(InputError, match="nearest is `support`"):
        project.run(["supprt"])


def test_a_second_manifest_shares_equal_steps(project: Project) -> None:
    project.run()
    second = project.folder / "second.yaml"
    second.write_text(project.path.read_text().replace("support: {train: support", "mine: {train: test"))
    run(load_manifest(second), project.store)
    assert project.fakes.taken() == ["train test", "correct"]


def test_merge_and_direct_and_the_table_of_scores(project: Project) -> None:
    project.edit("test: test.jsonl}", "test: test.jsonl, merge: true}")
    project.edit("version: 1", "version: 1\ndirect: true")
    result = run(project.manifest, project.store, ["sql"])
    assert project.fakes.taken() == ["compile", "train sql", "correct", "train sql direct", "merge", "evaluate 3"]
    names = [row["name"] for row in result.evaluations["sql"]]
    assert names == ["original", "uncorrected", "corrected", "direct"]
    assert result.evaluations["sql"][0]["perplexity"] == 2.7


def test_settings_reach_training(project: Project) -> None:
    project.edit("lora: {r: 8}", "lora: {r: 8, dropout: 0.1}")
    project.edit("max_steps: 5", "per_device_train_batch_size: 2, weight_decay: 0.1")
    project.run(["sql"])
    settings = project.fakes.arguments["train sql"]
    assert settings == {
        "lora_rank": 8,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "max_length": 512,
        "lora": {"dropout": 0.1},
        "args": {"learning_rate": 1e-4, "per_device_train_batch_size": 2, "weight_decay": 0.1},
        "activations": "none",
        "activation_rank": 0.125,
        "seed": 0,
        "resume": True,
    }


def test_a_data_folder_is_identified_by_its_content(project: Project) -> None:
    data = project.folder / "many"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "a"}\n')
    assert source_digest(Source(str(data))) != source_digest(Source("hub/many"))
    before = source_digest(Source(str(data)))
    (data / ".hidden").write_text("x")
    assert source_digest(Source(str(data))) == before
    (data / "b.jsonl").write_text('{"text": "b"}\n')
    assert source_digest(Source(str(data))) != before


def test_exact_steps_run_after_the_correction_and_are_merged(project: Project) -> None:
    project.edit("version: 1", "version: 1\npolish: {steps: 4}")
    project.edit("  support: {", "  support: {polish: {steps: 7}, merge: true, ")
    calls = project.run()
    assert [call for call in calls if "polish" in call] == ["polish sql", "polish support"]
    assert calls.index("correct") < calls.index("polish sql") < calls.index("evaluate 3")
    assert project.fakes.arguments["polish support"]["steps"] == 7
    assert calls.index("merge") > calls.index("polish support")
    project.edit("polish: {steps: 7}", "polish: {steps: 8}")
    assert project.reasons()["support.polish"] == "to run: field steps 7 -> 8"
    assert project.run() == ["polish support", "merge"]
