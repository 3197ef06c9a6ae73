"""The house plan as a test: which wing may import which, and how large a wing may grow."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.places import ROOT

# From the ground up. A wing imports only wings on lower floors; wings that share a floor do not import each other.
FLOORS = {
    "compiler": (
        {"errors", "results", "faults"},
        {"documents", "settings"},
        {"machine"},
        {"storage", "factors"},
        {"codes", "dequantize", "sources", "media"},
        {"conversations", "libraries"},
        {"data", "models", "emulators", "denoising"},
        {"streaming", "adapters"},
        {"compile", "refine", "evaluate", "encode"},
        {"correct", "polish", "sampling"},
        {"inspect"},
    ),
    "runtime": (
        {"sizes", "version"},
        {"collators", "modules", "activations", "anchors", "preferences", "streamed", "store"},
        {"training", "reporting", "generation"},
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


def modules_of(root: Path) -> dict[str, Path]:
    """Map every module of both packages by its dotted name."""
    return {
        ".".join(file.relative_to(root / house).with_suffix("").parts).removesuffix(".__init__"): file
        for house in FLOORS
        for file in sorted((root / house / "onelayer" / house).rglob("*.py"))
    }


def imported(module: str, modules: dict[str, Path]) -> Iterator[str]:
    """List every dotted name of onelayer that a module imports, including late imports and those for type checkers."""
    package = module.split(".") if modules[module].stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "onelayer")


def face(house: str, modules: dict[str, Path]) -> dict[str, str]:
    """Map the public names of a package to the modules that they come from."""
    root = f"onelayer.{house}"
    if root not in modules:
        return {}
    return {f"{root}.{name.split('.')[-1]}": name.rpartition(".")[0] for name in imported(root, modules)}


def imports(modules: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (module, imported module); a public name counts as the module that it comes from."""
    public = {name: home for house in FLOORS for name, home in face(house, modules).items()}
    for module in modules:
        if module.count(".") > 1:
            yield from ((module, public.get(name, name)) for name in imported(module, modules))


def wrong_imports(root: Path) -> list[str]:
    """List imports that do not run downwards."""
    found = []
    for module, name in imports(modules_of(root)):
        (house, wing), (other_house, *rest) = module.split(".")[1:3], name.split(".")[1:]
        other = rest[0] if rest else ""
        if house == "compiler" and other_house == "runtime":
            found.append(f"{module}: the compiler may not import the runtime")
        elif house == other_house and wing != other:
            if (house, other) not in FLOOR:
                found.append(f"{module}: {name} is in no wing")
            elif FLOOR[house, other] >= FLOOR.get((house, wing), -1):
                found.append(f"{module}: {wing} may not import {other}")
    return found


def circle(root: Path) -> list[str]:
    """Find modules that import each other in a circle, even inside a wing; empty if there is none."""
    modules = modules_of(root)
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, name in imports(modules):
        home = name if name in modules else name.rpartition(".")[0]
        graph[module] |= {home} & (modules.keys() - {module})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def misplaced(root: Path) -> list[str]:
    """List files and folders outside any wing, and wings with too many files."""
    found = []
    for house in FLOORS:
        for entry in sorted((root / house / "onelayer" / house).iterdir()):
            name = entry.stem if entry.suffix == ".py" else entry.name
            if name in ("__init__", "__pycache__") or entry.name == "py.typed":
                continue
            if (house, name) not in FLOOR:
                found.append(f"{house}/{entry.name}: belongs to no wing")
            elif len([file for file in entry.rglob("*.py") if file.name != "__init__.py"]) > MOST_FILES:
                found.append(f"{house}/{name}: more than {MOST_FILES} files")
    return found


def test_imports_run_downwards() -> None:
    assert wrong_imports(ROOT) == []


def test_no_imports_form_a_circle() -> None:
    assert circle(ROOT) == []


def test_every_file_has_a_wing_and_no_wing_is_crowded() -> None:
    assert misplaced(ROOT) == []


SOUND = {
    "compiler/__init__.py": "from onelayer.compiler.polish.command import polish_adapter as polish_adapter",
    "compiler/errors.py": "",
    "compiler/storage/files.py": "from onelayer.compiler.errors import InputError",
    "compiler/polish/command.py": "from onelayer.compiler.storage.files import read_json",
    "compiler/polish/settings.py": "import json",
    "runtime/__init__.py": "",
    "runtime/store/store.py": "from onelayer.compiler.storage import files",
    "runtime/pipeline/run.py": "def run():\n    from onelayer.compiler import polish_adapter",
}


def small_house(root: Path, **more: str) -> Path:
    for name, text in (SOUND | more).items():
        file = root / name.split("/")[0] / "onelayer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def faults(root: Path) -> list[str]:
    return [*wrong_imports(root), *misplaced(root), *([" > ".join(found)] if (found := circle(root)) else [])]


def test_valid_imports_give_no_faults(tmp_path: Path) -> None:
    assert faults(small_house(tmp_path)) == []


UPWARDS = "onelayer.compiler.machine.meter: machine may not import polish"
RUNTIME = "onelayer.compiler.machine.meter: the compiler may not import the runtime"


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("compiler/machine/meter.py", "from onelayer.compiler.polish.settings import STEPS", UPWARDS),
        ("compiler/machine/meter.py", "import onelayer.compiler.polish.settings", UPWARDS),
        ("compiler/machine/meter.py", "def f():\n    from onelayer.compiler.polish import settings", UPWARDS),
        ("compiler/machine/meter.py", "from ..polish.settings import STEPS", UPWARDS),
        ("compiler/machine/meter.py", "from .. import polish", UPWARDS),
        ("compiler/machine/meter.py", "from onelayer.compiler import polish_adapter", UPWARDS),
        ("compiler/machine/meter.py", "from onelayer.runtime.store.store import ArtifactStore", RUNTIME),
        ("compiler/machine/meter.py", "import onelayer.runtime", RUNTIME),
        ("compiler/machine/meter.py", "from onelayer import runtime", RUNTIME),
        (
            "runtime/store/keys.py",
            "from onelayer.runtime.pipeline.run import run",
            "onelayer.runtime.store.keys: store may not import pipeline",
        ),
        (
            "compiler/factors/ranks.py",
            "from onelayer.compiler.storage.files import read_json",
            "onelayer.compiler.factors.ranks: factors may not import storage",
        ),
        (
            "compiler/polish/settings.py",
            "from onelayer.compiler.polish.command import polish_adapter",
            "onelayer.compiler.polish.command > onelayer.compiler.polish.settings > onelayer.compiler.polish.command",
        ),
        ("compiler/helpers.py", "", "compiler/helpers.py: belongs to no wing"),
        ("runtime/tools/file.py", "", "runtime/tools: belongs to no wing"),
        ("compiler/polish/deep/file.py", "", "compiler/polish: more than 12 files"),
    ],
)
def test_a_planted_fault_is_found(file: str, text: str, fault: str, tmp_path: Path) -> None:
    more = {file: text}
    if "more than" in fault:
        more |= {f"compiler/polish/file{number}.py": "" for number in range(MOST_FILES - 2)}
    if ">" in fault:
        more["compiler/polish/command.py"] = "from onelayer.compiler.polish.settings import STEPS"
    assert faults(small_house(tmp_path, **more)) == [fault]
