"""What comes after the last step of a run: results put where the manifest wants them, and the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from onelayer.compiler.files import sha256_json
from onelayer.runtime.artifact_record import Artifact
from onelayer.runtime.artifacts import ArtifactStore
from onelayer.runtime.links import check_places, place
from onelayer.runtime.manifest import Manifest
from onelayer.runtime.report_data import collect
from onelayer.runtime.report_html import write_report
from onelayer.runtime.step_kinds import Step

REPORT = "report.html"
PLACED = {"correct": "corrected", "polish": "polished", "merge": "merged", "evaluate": "scores"}


def report_file(manifest: Manifest, store: ArtifactStore) -> Path:
    """Where the report of a manifest's runs lies: in its output folder, else beside the store's records of runs."""
    if manifest.output is not None:
        return Path(manifest.output) / REPORT
    return store.home / "runs" / sha256_json(str(manifest.path))[:32] / REPORT


def finish(
    manifest: Manifest,
    store: ArtifactStore,
    steps: list[Step],
    made: Mapping[str, Artifact],
    document: Mapping[str, Any],
    foreseen: Mapping[str, int | None],
) -> Path:
    """Put results where they are wanted, write the report of the run, and say where it is; one run at a time."""
    file = report_file(manifest, store)
    file.parent.mkdir(parents=True, exist_ok=True)
    budget = manifest.emulator.memory if manifest.emulator is not None else None
    with FileLock(file.parent / ".onelayer.lock"):
        if manifest.output is not None:
            place(_results(manifest, store, steps, made), Path(manifest.output))
        write_report(file, manifest.path, document, collect(store, made, foreseen), budget)
    return file


def check_results(manifest: Manifest, steps: list[Step]) -> None:
    """Raise `InputError` where something of another's stands in the manifest's `output`, before any step runs."""
    if manifest.output is not None:
        check_places([name for step in steps if (name := _result_name(manifest, step))], Path(manifest.output))


def _results(
    manifest: Manifest, store: ArtifactStore, steps: list[Step], made: Mapping[str, Artifact]
) -> dict[str, tuple[str, Path]]:
    """What people came for: a folder's name for each result of each task, its key and where it lies."""
    named = {
        name: made[step.name].key for step in steps if step.name in made and (name := _result_name(manifest, step))
    }
    return {name: (key, store.payload(key)) for name, key in named.items()}


def _result_name(manifest: Manifest, step: Step) -> str | None:
    """The folder of a step's result, None where it is only on the way to one."""
    label = PLACED.get(step.kind)
    if step.kind == "train" and manifest.emulator is None:
        label = "adapter"
    return None if step.task is None or label is None else f"{step.task}-{label}"
