"""Keeps what a report shows of every step, next to the report.

A run of one task, or artifacts that were pruned since, take nothing from the page that earlier runs put there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import GIB
from onelayer.compiler.results import Result
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.reporting.run_figures import Loadable, MemoryRow, ReportData, StepFacts, StepFigures
from onelayer.runtime.store.record import Artifact

EARLIER = "earlier"


class ReportedStep(Result):
    """One step of a report: its row in the run's result and, if its artifact exists, the rest."""

    row: dict[str, Any]
    facts: StepFacts | None = None
    memory: MemoryRow | None = None
    figures: StepFigures = StepFigures()
    loadable: Loadable | None = None
    versions: dict[str, str] | None = None


class ReportRecord(Result):
    """All steps that a report shows, and the score rows of every evaluated task."""

    steps: dict[str, ReportedStep]
    evaluations: dict[str, list[dict[str, Any]]]

    @property
    def document(self) -> dict[str, Any]:
        """The rows and scores in the form of a run's own JSON."""
        return {"steps": [step.row for step in self.steps.values()], "evaluations": self.evaluations}

    @property
    def data(self) -> ReportData:
        """The rest of what the page shows; errors of linears only if no layer is refined."""
        steps = list(self.steps.values())
        units = [row for step in steps for row in step.figures.units]
        loadable = [step.loadable for step in steps if step.loadable is not None]
        return ReportData(
            steps=[step.facts for step in steps if step.facts is not None],
            memory=[step.memory for step in steps if step.memory is not None],
            errors=[] if units else [row for step in steps for row in step.figures.errors],
            units=units,
            curves={name: list(step.figures.curve) for name, step in self.steps.items() if step.figures.curve},
            versions=next((step.versions for step in steps if step.versions), {}),
            loadable=tuple(item for item in loadable if item.is_product) or tuple(loadable),
        )


def reported_step(
    row: dict[str, Any],
    artifact: Artifact,
    path: Path,
    foreseen_bytes: int | None,
    figures: StepFigures,
    loadable: Loadable | None,
) -> ReportedStep:
    """Gather what a report shows of a step with an artifact; `foreseen_bytes` is the planner's peak."""
    name: str = row["name"]
    return ReportedStep(
        row=row,
        facts=StepFacts(name=name, path=str(path), **artifact.model_dump(include=set(StepFacts.model_fields))),
        memory=_memory(name, artifact, foreseen_bytes),
        figures=figures,
        loadable=loadable,
        versions=artifact.versions,
    )


def update_record(file: Path, now: ReportRecord, order: Sequence[str], tasks: Sequence[str]) -> ReportRecord:
    """Return the record in `file` with the steps of a run in place of its own, and write it back.

    Steps and tasks that are not in `order` and `tasks`, those of the whole manifest, are dropped.
    """
    before = _read(file)
    kept = {name: _as_earlier(step) for name, step in before.steps.items() if name not in now.steps}
    steps = {**kept, **now.steps}
    evaluations = {**before.evaluations, **now.evaluations}
    record = ReportRecord(
        steps={name: steps[name] for name in order if name in steps},
        evaluations={task: evaluations[task] for task in tasks if task in evaluations},
    )
    write_json(file, record.model_dump(mode="json"))
    return record


def _read(file: Path) -> ReportRecord:
    try:
        return ReportRecord.model_validate(read_json(file))
    except (InputError, ValidationError):  # it only shows: losing it costs what earlier runs put on the page
        return ReportRecord(steps={}, evaluations={})


def _as_earlier(step: ReportedStep) -> ReportedStep:
    row: Mapping[str, Any] = step.row
    if row["state"] in (EARLIER, "failed", "skipped"):
        return step
    return step.model_copy(update={"row": {**row, "state": EARLIER, "reason": "in an earlier run"}})


def _memory(name: str, artifact: Artifact, foreseen_bytes: int | None) -> MemoryRow | None:
    """Pair promised with measured memory.

    Streamed passes promise in their own report; the planner promises for the others.
    """
    if artifact.peak_device_bytes is None:
        return None
    promised = artifact.promised_bytes or foreseen_bytes
    return MemoryRow(
        step=name,
        promised_gib=None if promised is None else promised / GIB,
        measured_gib=artifact.peak_device_bytes / GIB,
    )
