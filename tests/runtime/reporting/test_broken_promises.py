"""A peak above the promise is marked: in a command's summary, in that of a run, and in the report."""

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_steps import FakeSteps, Project
from onelayer.runtime.pipeline import costs
from onelayer.runtime.pipeline.kinds import step_costs
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.pipeline.step import model_directory, model_source
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.reporting.run_summaries import run_summary
from onelayer.runtime.reporting.tables import report_line, summary
from onelayer.runtime.sizes import broken_promise

KEPT = {"largest_unit_bytes": 1 << 20, "workspace_bytes": 3 << 20, "peak_device_bytes": 4 << 20}
COSTS = {"peak_host_bytes": 4, "bytes_read": 5, "seconds": 0.1}


def test_a_kept_promise_is_not_marked() -> None:
    assert broken_promise(10, 10) == broken_promise(10, None) == ""
    assert "MORE" not in report_line({**KEPT, **COSTS})


def test_a_command_marks_a_broken_promise() -> None:
    line = report_line({**KEPT, **COSTS, "peak_device_bytes": 10 << 20})
    assert line.startswith("MORE THAN PROMISED: 10.00 MiB of 4.00 MiB, 2.5 times\ndevice peak 10.00 MiB")


def test_a_report_inside_a_document_is_marked_too() -> None:
    broken = {"output": "o", "report": {**KEPT, **COSTS, "peak_device_bytes": 10 << 20}}
    assert "report                     MORE THAN PROMISED: 10.00 MiB of 4.00 MiB" in summary(broken)
    assert "MORE" not in summary({"output": "o", "report": {**KEPT, **COSTS}})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return Project(tmp_path, FakeSteps(monkeypatch))


def test_a_run_marks_broken_promises(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import fake_steps

    monkeypatch.setitem(fake_steps.REPORT, "peak_device_bytes", 30)  # of 1 + 2 promised
    project.edit("version: 1", "version: 1\noutput: out")
    document = run(project.manifest, project.store).model_dump(mode="json")
    rows = {row["name"]: row for row in document["steps"]}
    assert (rows["compile"]["promised_bytes"], rows["compile"]["peak_device_bytes"]) == (3, 30)
    mark = "compile: MORE THAN PROMISED: 30 B of 3 B, 10.0 times"
    assert mark in run_summary(document, frozenset())
    assert mark in (project.folder / "out" / "report.html").read_text()


def test_a_training_is_predicted_for_the_machine_it_runs_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from helpers.tiny_models import save_tiny

    save_tiny("llama", tmp_path / "tiny")
    project.edit("path: model", "path: tiny")

    def predicted() -> Any:
        manifest = project.manifest
        steps = {step.name: step for step in steps_of(manifest, ["sql"])}
        known = costs.Costs(manifest, model_directory(model_source(manifest)))
        return step_costs(steps["sql.train"], known).peak_bytes

    monkeypatch.setattr(costs, "shows_gpu", lambda: True)
    on_gpu = predicted()
    monkeypatch.setattr(costs, "shows_gpu", lambda: False)
    assert predicted() > on_gpu  # a CPU computes the loss with temporaries, where a GPU has one kernel
    monkeypatch.setattr(costs, "shows_gpu", lambda: True)
    project.edit("max_steps: 5", "max_steps: 5, use_cpu: true")
    assert predicted() > on_gpu
