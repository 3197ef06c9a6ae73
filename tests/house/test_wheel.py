"""The wheel: it holds both packages whole, declares what they import, and works where there is no clone."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.places import ROOT
from helpers.tiny_models import save_tiny
from onelayer.runtime import __version__

PACKAGES = [ROOT / house / "onelayer" for house in ("compiler", "runtime")]
BROUGHT_BY = {"annotated_types": "pydantic", "jinja2": "torch", "pyarrow": "datasets", "pydantic_core": "pydantic"}
# Calls the entry point once per command line of argv[2]; then says which code ran.
CALLS = """
import importlib, json, sys
module, function = sys.argv[1].split(":")
main = getattr(importlib.import_module(module), function)
codes = []
lines = json.loads(sys.argv[2])
for arguments in lines:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as ending:
        codes.append(ending.code)
import onelayer.compiler, onelayer.runtime
print(json.dumps([codes, onelayer.compiler.__file__, onelayer.runtime.__file__]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as pip does, without a network, and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> importlib.metadata.Distribution:
    [found] = importlib.metadata.distributions(name="onelayer", path=[str(unpacked)])
    return found


def files_of(folder: Path) -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file.as_posix() for file in found if "__pycache__" not in file.parts}


def test_a_wheel_holds_every_file_of_both_packages(unpacked: Path) -> None:
    held = files_of(unpacked / "onelayer")
    assert held == files_of(PACKAGES[0]) | files_of(PACKAGES[1])
    assert {"compiler/py.typed", "runtime/py.typed", "compiler/__init__.py", "runtime/__main__.py"} <= held
    assert {name.split("/")[0] for name in files_of(unpacked)} - {"onelayer"} == {f"onelayer-{__version__}.dist-info"}


def test_a_wheel_declares_what_its_code_imports(metadata: importlib.metadata.Distribution) -> None:
    """Each import belongs to a library that is declared, if only for an extra, or that one of those brings."""
    declared = {canonicalize_name(Requirement(text).name) for text in metadata.requires or [] if "'dev'" not in text}
    owners = importlib.metadata.packages_distributions()
    for root in imported() & owners.keys() - {"onelayer"}:
        names = {canonicalize_name(owner) for owner in [*owners[root], BROUGHT_BY.get(root, root)]}
        assert names & declared, f"{root} is imported and not declared"


def imported() -> set[str]:
    """Collect the first words of all names that the packages import."""
    code = [file.read_text() for package in PACKAGES for file in package.rglob("*.py")]
    return {name for text in code for name in re.findall(r"^ *(?:from|import) (\w+)", text, flags=re.MULTILINE)}


def test_an_unpacked_wheel_works_without_a_clone(
    unpacked: Path, metadata: importlib.metadata.Distribution, tmp_path: Path, own_store: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    [entry] = metadata.entry_points.select(group="console_scripts", name="onelayer")
    lines = [["--version"], ["--help"], ["plan", "model", "--memory", "8G"]]
    output, codes, compiler, runtime = _ran(tmp_path, unpacked, entry.value, lines)
    assert codes == [0, 0, 0]
    assert f"onelayer {__version__}\nUsage: onelayer" in output
    assert "fastest that fits" in output
    assert Path(compiler).is_relative_to(unpacked)
    assert Path(runtime).is_relative_to(unpacked)


def _ran(folder: Path, unpacked: Path, entry: str, lines: list[list[str]]) -> Any:
    # Without `site`, the editable installation of this clone is not on the path; only the wheel and libraries are.
    paths = [str(unpacked), *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", CALLS, entry, json.dumps(lines)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [ended.stdout, *json.loads(ended.stdout.splitlines()[-1])]
