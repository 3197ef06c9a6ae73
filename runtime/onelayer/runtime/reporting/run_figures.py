"""Collects the figures of a run's report from what the run left in the store."""

import re
from pathlib import Path
from typing import Any, Literal

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import GIB
from onelayer.compiler.results import Result
from onelayer.compiler.storage.files import read_json


class MemoryRow(Result):
    """Device memory of one step in GiB: what was promised before it ran, and what was measured."""

    step: str
    promised_gib: float | None
    measured_gib: float

    @property
    def promised_bytes(self) -> int | None:
        """What was promised, in bytes."""
        return None if self.promised_gib is None else round(self.promised_gib * GIB)

    @property
    def measured_bytes(self) -> int:
        """What was measured, in bytes."""
        return round(self.measured_gib * GIB)


class LinearError(Result):
    """One linear of the emulator: its layer's number, its name within the layer, its rank and its relative error."""

    layer: int
    kind: str
    rank: int
    error: float


class UnitErrors(Result):
    """One layer refined by `step`: its number, the rest of its name, and its output's error before and after."""

    step: str
    layer: int
    kind: str
    before: float
    after: float


class StepFacts(Result):
    """The facts about one step's artifact."""

    name: str
    kind: str
    key: str
    digest: str
    seconds: float
    total_bytes: int
    created: str
    path: str


class StepFigures(Result):
    """The figures that the report draws for one step."""

    errors: tuple[LinearError, ...] = ()
    units: tuple[UnitErrors, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()


# How to load a result.
Loader = Literal["adapter", "model"]


class Loadable(Result):
    """One result that the report shows how to load."""

    step: str
    path: str
    loader: Loader
    is_product: bool = True


class ReportData(Result):
    """Everything that a report shows in addition to the run's own result.

    `errors` of linears are there only if no layer is refined.
    """

    steps: list[StepFacts]
    memory: list[MemoryRow]
    errors: list[LinearError]
    units: list[UnitErrors]
    curves: dict[str, list[tuple[float, float]]]
    versions: dict[str, str]
    loadable: tuple[Loadable, ...] = ()


def no_figures(step: str, payload: Path) -> StepFigures:
    """Draw nothing."""
    return StepFigures()


def emulator_figures(step: str, payload: Path) -> StepFigures:
    """Read the errors of an emulator's linears and stacks of experts."""
    document, rows = _document(payload / "emulator.json"), []
    for row in [*document.get("linears", []), *document.get("stacks", [])]:
        found = re.search(r"(?:^|\.)(\d+)\.(.+)$", row["name"])
        layer, kind = (int(found[1]), found[2]) if found else (0, row["name"])
        rows.append(LinearError(layer=layer, kind=kind, rank=row["rank"], error=row["error"]))
    return StepFigures(errors=tuple(rows))


def refined_figures(step: str, payload: Path) -> StepFigures:
    """Read the errors of a refined emulator's layers."""
    rows = []
    for unit in _document(payload / "emulator.json").get("refined", {}).get("units", []):
        kind, _, number = unit["name"].rpartition(".")
        layer, kind = (int(number), kind) if number.isdecimal() else (0, unit["name"])
        rows.append(UnitErrors(step=step, layer=layer, kind=kind, before=unit["before"], after=unit["after"]))
    return StepFigures(units=tuple(rows))


def training_figures(step: str, payload: Path) -> StepFigures:
    """Read the losses of a training."""
    losses = _document(payload / "onelayer.json").get("training", {}).get("losses") or []
    return StepFigures(curve=tuple((float(number), float(loss)) for number, loss in losses))


def polish_figures(step: str, payload: Path) -> StepFigures:
    """Read the losses of a polish."""
    steps = _document(payload / "onelayer.json").get("steps") or []
    losses = ((float(number), float(row["loss"])) for number, row in enumerate(steps, start=1))
    return StepFigures(curve=tuple(losses))


def _document(file: Path) -> dict[str, Any]:
    """Read a JSON mapping, empty if the file is missing: not every step writes each file."""
    try:
        document = read_json(file)
    except InputError:
        return {}
    return document if isinstance(document, dict) else {}
