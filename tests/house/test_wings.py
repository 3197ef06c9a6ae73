"""The house plan, as a test: which wing may import which, and how large a wing may grow."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. A wing imports wings on lower floors only; wings that share a floor do not know each other.
FLOORS = {
    "compiler": (
        {"errors", "results"},
        {"documents", "settings"},
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


def test_no_file_imports_itself_in_a_circle() -> None:
    files = {
        ".".join(file.with_suffix("").relative_to(ROOT / house).parts): file
        for house in FLOORS
        for file in source(house).rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for module, file in files.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imports[module] = ({node.module or "" for node in nodes} | names) & files.keys() - {module}
    tuple(TopologicalSorter(imports).static_order())


PLANTED = {
    "an upward import": ("machine/meter.py", "from onelayer.compiler.storage import files"),
    "an import between wings of one floor": ("compile/job.py", "import onelayer.compiler.refine.job"),
    "a late import upwards": ("data/rows.py", "def f():\n    from onelayer.compiler.streaming import stream"),
    "an import of the runtime": ("polish/job.py", "from onelayer.runtime.sizes import size"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_import_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    name, text = PLANTED[what]
    (source("compiler") / name).parent.mkdir(parents=True)
    (source("compiler") / name).write_text("import onelayer.compiler.errors\n")
    test_imports_run_downwards("compiler")
    (source("compiler") / name).write_text(text)
    with pytest.raises(AssertionError):
        test_imports_run_downwards("compiler")


def test_a_planted_circle_a_crowd_and_a_stray_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    wing = source("compiler") / "machine"
    wing.mkdir(parents=True)
    (wing / "a.py").write_text("from onelayer.compiler.machine.b import B")
    (wing / "b.py").write_text("def f():\n    from onelayer.compiler.machine import a")
    with pytest.raises(CycleError):
        test_no_file_imports_itself_in_a_circle()
    test_every_file_has_a_wing_and_no_wing_is_crowded("compiler")
    for number in range(MOST_FILES - 1):
        (wing / f"file_{number}.py").touch()
    with pytest.raises(AssertionError, match="machine"):
        test_every_file_has_a_wing_and_no_wing_is_crowded("compiler")
    (wing / "file_0.py").rename(source("compiler") / "stray.py")
    with pytest.raises(AssertionError, match="belongs to no wing"):
        test_every_file_has_a_wing_and_no_wing_is_crowded("compiler")
