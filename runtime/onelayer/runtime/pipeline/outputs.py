"""What comes after the last step of a run: results put where the manifest wants them, and the report."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.pipeline.step import Step
from onelayer.runtime.reporting.html_report import write_report
from onelayer.runtime.reporting.run_figures import collect
from onelayer.runtime.store.record import Artifact
from onelayer.runtime.store.store import ArtifactStore

REPORT = "report.html"
PLACED = {"correct": "corrected", "polish": "polished", "merge": "merged", "evaluate": "scores"}


def report_file(manifest: Manifest, store: ArtifactStore) -> Path:
    """Where the report of a manifest's runs lies: in its output folder, else beside the store's records of runs."""
    if manifest.output is not None:
        return Path(manifest.output) / REPORT
    return store.home / "runs" / sha256_json(str(manifest.path))[:32] / REPORT


def publish_run(
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
            link_outputs(_results(manifest, store, steps, made), Path(manifest.output))
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


# Smaller files are copied: people edit them.
LINKED_BYTES = 1 << 20
MARK = ".onelayer.json"


def check_places(names: Iterable[str], output: Path) -> None:
    """Refuse, before any work, a folder in the way that was not put there by a run."""
    for name in names:
        if (output / name).exists() and _mark_of(output / name) is None:
            raise InputError(
                f"{output / name}: holds something that no run put there; remove it or set another `output`"
            )


def link_outputs(payloads: Mapping[str, tuple[str, Path]], output: Path) -> list[Path]:
    """Put each payload, given as (artifact key, folder), under its name below `output`; what is up to date stays.

    Raises `InputError` for a folder in the way that was not put there by this.
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
        except OSError:  # another disk, or a file system without hard links
            target.symlink_to(source.resolve())


def _mark_of(folder: Path) -> str | None:
    """The key of the artifact that was put in a folder, None where none was."""
    if not (folder / MARK).is_file():
        return None
    document = read_json(folder / MARK)
    return document.get("key") if isinstance(document, dict) else None
