"""What a run left in the store in, the figures that its report shows out."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import GIB
from onelayer.compiler.results import Result
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.store.record import Artifact
from onelayer.runtime.store.store import ArtifactStore


class MemoryRow(Result):
    """Device memory of one step in GiB: what was promised before it ran, what was measured."""

    step: str
    promised_gib: float | None
    measured_gib: float


class LinearError(Result):
    """One linear of the emulator: the number of its layer, what it is called there, its rank and its relative error."""

    layer: int
    kind: str
    rank: int
    error: float


class UnitErrors(Result):
    """One layer of an emulator that the step `step` refined: its number, what it is called beside that, and the
    relative error of its output before and after."""

    step: str
    layer: int
    kind: str
    before: float
    after: float


class StepFacts(Result):
    """One step that is there: its artifact in short."""

    name: str
    kind: str
    key: str
    digest: str
    seconds: float
    total_bytes: int
    created: str
    path: str


class ReportData(Result):
    """Everything that a report shows beside the run's own result; `errors` of linears only where none are refined."""

    steps: list[StepFacts]
    memory: list[MemoryRow]
    errors: list[LinearError]
    units: list[UnitErrors]
    curves: dict[str, list[tuple[float, float]]]
    versions: dict[str, str]


def collect(store: ArtifactStore, made: Mapping[str, Artifact], foreseen: Mapping[str, int | None]) -> ReportData:
    """The facts of every step of a run; `foreseen` are the planner's peaks in bytes, by step."""
    payloads = {name: store.payload(artifact.key) for name, artifact in made.items()}
    emulator = next((payloads[name] for name, artifact in made.items() if artifact.kind == "compile"), None)
    units = [
        row for name, artifact in made.items() if artifact.kind == "refine" for row in _units(name, payloads[name])
    ]
    return ReportData(
        steps=[_facts(name, artifact, payloads[name]) for name, artifact in made.items()],
        memory=[row for name, artifact in made.items() if (row := _memory(name, artifact, foreseen))],
        errors=[] if emulator is None or units else _errors(_document(emulator / "emulator.json")),
        units=units,
        curves={name: points for name in made if (points := _curve(made[name].kind, payloads[name]))},
        versions=next((artifact.versions for artifact in made.values()), {}),
    )


def _facts(name: str, artifact: Artifact, payload: Path) -> StepFacts:
    shared = {
        field: getattr(artifact, field) for field in ("kind", "key", "digest", "seconds", "total_bytes", "created")
    }
    return StepFacts(name=name, path=str(payload), **shared)


def _memory(name: str, artifact: Artifact, foreseen: Mapping[str, int | None]) -> MemoryRow | None:
    """The streamed passes promise by themselves, in their report; the others by the planner."""
    if artifact.peak_device_bytes is None:
        return None
    promised = artifact.promised_bytes or foreseen.get(name)
    return MemoryRow(
        step=name,
        promised_gib=None if promised is None else promised / GIB,
        measured_gib=artifact.peak_device_bytes / GIB,
    )


def _errors(document: Mapping[str, Any]) -> list[LinearError]:
    rows = []
    for row in [*document.get("linears", []), *document.get("stacks", [])]:
        found = re.search(r"(?:^|\.)(\d+)\.(.+)$", row["name"])
        layer, kind = (int(found[1]), found[2]) if found else (0, row["name"])
        rows.append(LinearError(layer=layer, kind=kind, rank=row["rank"], error=row["error"]))
    return rows


def _units(step: str, payload: Path) -> list[UnitErrors]:
    rows = []
    for unit in _document(payload / "emulator.json").get("refined", {}).get("units", []):
        kind, _, number = unit["name"].rpartition(".")
        layer, kind = (int(number), kind) if number.isdecimal() else (0, unit["name"])
        rows.append(UnitErrors(step=step, layer=layer, kind=kind, before=unit["before"], after=unit["after"]))
    return rows


def _curve(kind: str, payload: Path) -> list[tuple[float, float]]:
    """Steps and losses of a training, or of a polish."""
    if kind not in ("train", "polish"):
        return []
    document = _document(payload / "onelayer.json")
    losses = document.get("training", {}).get("losses") or []
    if kind == "polish":
        losses = [(number, row["loss"]) for number, row in enumerate(document.get("steps") or [], start=1)]
    return [(float(step), float(loss)) for step, loss in losses]


def _document(file: Path) -> dict[str, Any]:
    """A JSON mapping, empty where the file is not there: not every step writes each."""
    try:
        document = read_json(file)
    except InputError:
        return {}
    return document if isinstance(document, dict) else {}
