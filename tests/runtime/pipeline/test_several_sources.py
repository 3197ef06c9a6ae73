"""Several data sets for one thing: every one counts, in commands and in manifests, and each is recorded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.fake_steps import FakeSteps, Project
from helpers.tiny_models import save_tiny
from onelayer.runtime.cli.app import app
from onelayer.runtime.pipeline.plan import specify
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.pipeline.step import source_digests
from onelayer.runtime.pipeline.steps import steps_of

SETS = {"one": "the quick brown fox", "two": "what is the sum of two and three"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("several")
    save_tiny("llama", root / "model")
    for name, text in SETS.items():
        (root / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return root


def call(*arguments: object) -> dict[str, object]:
    outcome = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    document: dict[str, object] = json.loads(outcome.stdout)
    return document


def test_evaluate_scores_every_set(place: Path) -> None:
    def tokens(*names: str) -> int:
        data = [word for name in names for word in ("--data", place / f"{name}.jsonl")]
        results = call("evaluate", place / "model", *data)["results"]
        assert isinstance(results, list)
        return int(results[0]["tokens"])

    assert tokens("one", "two") == tokens("one") + tokens("two")


def test_train_takes_and_records_every_set(place: Path, tmp_path: Path) -> None:
    data = [word for name in SETS for word in ("--data", place / f"{name}.jsonl")]
    call("train", place / "model", *data, "--max-steps", 1, "--batch-size", 2, "--output", tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "onelayer.json").read_text())["data"]
    assert recorded["examples"] == 2
    assert recorded["paths"] == [str(place / f"{name}.jsonl") for name in SETS]


def keys(project: Project) -> dict[str, dict[str, str]]:
    """The inputs of every step, by role."""
    steps = steps_of(project.manifest, list(project.manifest.tasks))
    digests = source_digests(steps)
    return {step.name: specify(step, digests, {})[0].inputs for step in steps}


def test_a_task_takes_lists_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, FakeSteps(monkeypatch))
    alone = keys(project)
    project.edit("train: sql.jsonl, test: test.jsonl", "train: [sql.jsonl], test: [test.jsonl]")
    assert keys(project) == alone
    project.edit(
        "train: [sql.jsonl], test: [test.jsonl]", "train: [sql.jsonl, mix.jsonl], test: [test.jsonl, sql.jsonl]"
    )
    several = keys(project)
    assert several["sql.train"].keys() - alone["sql.train"].keys() == {"train data 2"}
    assert several["sql.evaluate"].keys() - alone["sql.evaluate"].keys() == {"test data 2"}
    run(project.manifest, project.store)
    assert [Path(path).name for path in project.fakes.data["train sql"]] == ["sql.jsonl", "mix.jsonl"]
    before = several["sql.train"]
    project.append("mix.jsonl")
    assert keys(project)["sql.train"] != before
