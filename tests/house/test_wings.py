"""The house plan, as a test: which wing may import which, and how large a wing may grow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. A wing imports wings on lower floors only; wings that share a floor do not know each other.
FLOORS = {
    "compiler": (
        {"errors", "results"},
        {"settings"},
        {"machine"},
        {"storage", "factors"},
        {"data", "models", "emulators"},
        {"streaming", "adapters"},
        {"compile", "refine", "evaluate"},
        {"correct", "polish"},
        {"inspect"},
    ),
    "runtime": (
        {"sizes", "faults"},
        {"modules", "activations", "store"},
        {"training", "reporting"},
        {"planning"},
        {"manifest"},
        {"pipeline"},
        {"cli"},
        {"__main__"},
    ),
}
FLOOR = {
    (house, wing): floor for house, floors in FLOORS.items() for floor, wings in enumerate(floors) for wing in wings
}
MOST_FILES = 12


def source(house: str) -> Path:
    return ROOT / house / "onelayer" / house


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(house, wing) of every import in a file, late ones and those for type checkers included; a face has no wing."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module.count(".") > 1 else [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            if len(parts) > 2 and parts[0] == "onelayer" and (parts[1], parts[2]) in FLOOR:
                yield parts[1], parts[2]


@pytest.mark.parametrize("house", FLOORS)
def test_imports_run_downwards(house: str) -> None:
    for file in sorted(source(house).rglob("*.py")):
        wing = file.relative_to(source(house)).with_suffix("").parts[0]
        if wing == "__init__":
            continue
        for other_house, other in imported(file):
            if (house, wing) == (other_house, other):
                continue
            assert house == "runtime" or other_house == "compiler", f"{file}: the compiler imports the runtime"
            if house == other_house:
                assert FLOOR[house, other] < FLOOR[house, wing], f"{file}: {wing} may not import {other}"


@pytest.mark.parametrize("house", FLOORS)
def test_every_file_has_a_wing_and_no_wing_is_crowded(house: str) -> None:
    for entry in source(house).iterdir():
        name = entry.stem if entry.suffix == ".py" else entry.name
        if name in ("__init__", "__pycache__") or entry.name == "py.typed":
            continue
        assert (house, name) in FLOOR, f"{entry}: belongs to no wing"
        if entry.is_dir():
            assert len([file for file in entry.glob("*.py") if file.name != "__init__.py"]) <= MOST_FILES, entry
