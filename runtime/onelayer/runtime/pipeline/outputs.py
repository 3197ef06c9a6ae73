"""Publishes a finished run: its results in the manifest's `output`, and the report."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.pipeline.kinds import STEP_KINDS
from onelayer.runtime.pipeline.step import Step
from onelayer.runtime.reporting.html_report import write_report
from onelayer.runtime.reporting.run_figures import Loadable
from onelayer.runtime.reporting.run_record import ReportedStep, ReportRecord, reported_step, update_record
from onelayer.runtime.store.record import Artifact
from onelayer.runtime.store.store import ArtifactStore

REPORT = "report.html"
# Next to the report: what it shows of every step, so that a run of some steps keeps the others.
RECORD = ".report.json"


@dataclass(frozen=True)
class FinishedRun:
    """The steps of a run, the existing artifacts by step, and the planner's peaks in bytes.

    `order` names the steps of the whole manifest.
    """

    manifest: Manifest
    store: ArtifactStore
    steps: list[Step]
    made: Mapping[str, Artifact]
    foreseen: Mapping[str, int | None]
    order: list[str]

    @property
    def made_steps(self) -> list[Step]:
        """The steps whose artifacts exist."""
        return [step for step in self.steps if step.name in self.made]

    def payload(self, step: Step) -> Path:
        """Return the path of a step's result."""
        return self.store.payload(self.made[step.name].key)


def report_file(manifest: Manifest, store: ArtifactStore) -> Path:
    """Return the path of a manifest's report: in its output folder, else with the store's records of runs."""
    if manifest.output is not None:
        return Path(manifest.output) / REPORT
    return store.home / "runs" / sha256_json(str(manifest.path))[:32] / REPORT


def publish_run(run: FinishedRun, document: Mapping[str, Any]) -> Path:
    """Put results into the output folder, write the report of the run and return its path; one run at a time."""
    from filelock import FileLock

    manifest, file = run.manifest, report_file(run.manifest, run.store)
    file.parent.mkdir(parents=True, exist_ok=True)
    budget = manifest.emulator.memory if manifest.emulator is not None else None
    with FileLock(file.parent / ".onelayer.lock"):
        if manifest.output is not None:
            link_outputs(_results(run), Path(manifest.output))
        record = update_record(file.with_name(RECORD), _reported(run, document), run.order, list(manifest.tasks))
        write_report(file, manifest.path, record.document, record.data, budget)
    return file


def _reported(run: FinishedRun, document: Mapping[str, Any]) -> ReportRecord:
    """Gather what the report shows of the steps of this run."""
    rows = {row["name"]: row for row in document["steps"]}
    steps = {name: ReportedStep(row=row) for name, row in rows.items()}
    for step in run.made_steps:
        figures = STEP_KINDS[step.kind].figures(step.name, run.payload(step))
        facts = (run.made[step.name], run.payload(step), run.foreseen.get(step.name), figures, _loadable(run, step))
        steps[step.name] = reported_step(rows[step.name], *facts)
    return ReportRecord(steps=steps, evaluations=document["evaluations"])


def _loadable(run: FinishedRun, step: Step) -> Loadable | None:
    """Return where a result is loaded from: the manifest's `output`, which no pruning touches, or the store."""
    kind, name = STEP_KINDS[step.kind], _result_name(run.manifest, step)
    if kind.loader is None:
        return None
    kept = run.manifest.output is not None and name is not None
    path = Path(str(run.manifest.output)) / str(name) if kept else run.payload(step)
    return Loadable(step=step.name, path=str(path), loader=kind.loader, is_product=kind.is_product)


def check_results(manifest: Manifest, steps: list[Step]) -> None:
    """Raise `InputError`, before any step runs, if a file or folder in the manifest's `output` is in the way."""
    if manifest.output is not None:
        check_places([name for step in steps if (name := _result_name(manifest, step))], Path(manifest.output))


def _results(run: FinishedRun) -> dict[str, tuple[str, Path]]:
    """Map the folder of each result, and of the logs of intermediate ones, to its key and its path in the store."""
    results = {}
    for step in run.made_steps:
        key, payload, name = run.made[step.name].key, run.payload(step), _result_name(run.manifest, step)
        logs = STEP_KINDS[step.kind].logs
        if name is not None:
            results[name] = (key, payload)
        elif logs is not None and (payload / logs).is_dir():
            results[f"{step.name.replace('.', '-')}-{logs}"] = (key, payload / logs)
    return results


def _result_name(manifest: Manifest, step: Step) -> str | None:
    """Name the folder of a step's result; None for an intermediate result."""
    kind = STEP_KINDS[step.kind]
    if step.task is None or kind.folder is None or (kind.intermediate and manifest.emulator is not None):
        return None
    return f"{step.task}-{kind.folder}"


# Smaller files are copied: people edit them.
LINKED_BYTES = 1 << 20
MARK = ".onelayer.json"


def check_places(names: Iterable[str], output: Path) -> None:
    """Refuse, before any work, a folder in the way that no run created."""
    for name in names:
        if (output / name).exists() and _mark_of(output / name) is None:
            raise InputError(f"{output / name}: was not created by a run; remove it or set another `output`")


def link_outputs(payloads: Mapping[str, tuple[str, Path]], output: Path) -> list[Path]:
    """Put each payload, given as (artifact key, folder), under its name in `output`, unless it is up to date there.

    Raises `InputError` for a folder in the way that this function did not create.
    """
    check_places(payloads, output)
    placed = []
    for name, (key, payload) in payloads.items():
        target = output / name
        if target.exists() and _mark_of(target) == key:
            placed.append(target)
            continue
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _fill(payload, partial)
        write_json(partial / MARK, {"key": key})
        if target.exists():
            old = output / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
        placed.append(target)
    return placed


def _fill(payload: Path, folder: Path) -> None:
    for source in sorted(payload.rglob("*")):
        target = folder / source.relative_to(payload)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size < LINKED_BYTES:
            shutil.copy2(source, target)
            continue
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without hard links; a link would not survive a prune
            shutil.copy2(source, target)


def _mark_of(folder: Path) -> str | None:
    """Read the key of the artifact that a run put in a folder; None if there is none."""
    if not (folder / MARK).is_file():
        return None
    document = read_json(folder / MARK)
    return document.get("key") if isinstance(document, dict) else None
