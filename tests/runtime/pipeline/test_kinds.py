"""A new kind of step needs one record and one step: everything else follows."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from helpers.fake_steps import FakeSteps, Project
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.pipeline import task_steps
from onelayer.runtime.pipeline.costs import StepCosts
from onelayer.runtime.pipeline.housekeeping import list_artifacts, reachable_keys
from onelayer.runtime.pipeline.kinds import STEP_KINDS, StepKind, product_kinds
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import RunResult, run
from onelayer.runtime.pipeline.step import Step, directory_digest
from onelayer.runtime.reporting.run_figures import StepFigures
from onelayer.runtime.reporting.run_summaries import plan_steps_summary, run_summary
from onelayer.runtime.store.prune import prune

COUNT = StepKind(
    version=7,
    digest=lambda payload: (payload / "count.json").read_text(),
    resumable=True,
    predict=lambda basis: StepCosts(read_bytes=basis.model_bytes, write_bytes=10, peak_bytes=3 << 30),
    folder="counted",
    loader="model",
    figures=lambda step, payload: StepFigures(curve=((1.0, 2.0), (2.0, 1.0))),
    scores=lambda payload: [json.loads((payload / "count.json").read_text())],
)
SCORES = {"name": "counted", "loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5, "tokens": 10}


class Counting:
    """Steps of the new kind, one per task; the first attempt stops halfway."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, task: str, fields: Mapping[str, Any]) -> Step:
        needs = {"adapter": f"{task}.correct"}
        return Step(f"{task}.count", "count", self.execute, fields, {}, needs=needs, task=task)

    def execute(self, inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        work = output.with_name(f".{output.name}.count")
        self.seen.append("resumed" if work.is_dir() else "begun")
        if not work.is_dir():
            work.mkdir()
            raise KeyboardInterrupt
        output.mkdir()
        (output / "count.json").write_text(json.dumps(SCORES))
        return {"peak_device_bytes": 5 << 30}


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Register the kind, and add a step of it to the task `support`."""
    counting, steps_of_task = Counting(), task_steps.steps_of_task

    def with_count(manifest: Manifest, task: str) -> list[Step]:
        own = [counting.step(task, {"up_to": manifest.seed})] if task == "support" else []
        return [*steps_of_task(manifest, task), *own]

    monkeypatch.setitem(STEP_KINDS, "count", COUNT)
    monkeypatch.setattr("onelayer.runtime.pipeline.steps.steps_of_task", with_count)
    return counting


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path, FakeSteps(monkeypatch))
    shutil.rmtree(project.folder / "model")
    tiny_models.save_tiny("llama", project.folder / "model")
    project.path.write_text(project.path.read_text() + "output: results\n")
    return project


def finish(project: Project) -> RunResult:
    with pytest.raises(KeyboardInterrupt):
        run(project.manifest, project.store)
    return run(project.manifest, project.store)


def test_a_new_kind_is_planned_run_found_again_and_resumed(project: Project, counting: Counting) -> None:
    foreseen = plan(project.manifest, project.store)
    row = foreseen.steps[-1]
    assert (row.name, row.kind, row.state, row.write_bytes, row.peak_bytes) == (
        "support.count",
        "count",
        "to run",
        10,
        3 << 30,
    )
    assert row.read_bytes == foreseen.steps[0].read_bytes
    assert "3.00 GiB" in plan_steps_summary(foreseen.model_dump(mode="json"))
    result = finish(project)
    assert counting.seen == ["begun", "resumed"]
    assert (result.steps[-1].state, result.steps[-1].name) == ("ran", "support.count")
    assert run(project.manifest, project.store).steps[-1].state == "cached"
    project.edit("version: 1", "version: 1\nseed: 3")
    assert "field up_to 0 -> 3" in project.reasons()["support.count"]


def test_results_of_a_new_kind_are_shown_and_placed(project: Project, counting: Counting) -> None:
    result = finish(project)
    text = run_summary(result.model_dump(mode="json"), product_kinds())
    assert f"support.count: {result.steps[-1].path}" in text
    assert result.evaluations["support"] == [SCORES]
    assert (project.folder / "results/support-counted/count.json").is_file()
    page = Path(str(result.report)).read_text()
    assert "Load <code>support.count</code>" in page
    assert "AutoModelForCausalLM" in page
    assert "training loss" in page
    artifact = project.store.find(str(result.steps[-1].key))
    assert artifact is not None
    assert (artifact.step_version, json.loads(artifact.digest)) == (7, SCORES)


def test_results_of_a_new_kind_are_listed_and_pruned(project: Project, counting: Counting) -> None:
    key = finish(project).steps[-1].key
    assert "count" in {row["kind"] for row in list_artifacts(project.store)}
    assert key in reachable_keys(project.manifest, project.store)
    assert prune(project.store, keep=reachable_keys(project.manifest, project.store)).removed == []
    assert key in prune(project.store, keep=set()).removed


def test_a_kind_needs_only_a_version() -> None:
    kind = StepKind(version=1, digest=directory_digest)
    assert not kind.is_product
    assert kind.figures("step", Path()) == StepFigures()
    assert kind.predict.__name__ == "unknown_costs"
