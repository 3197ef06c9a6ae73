"""The commands in fresh processes: what they import, which values they read and how they write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from helpers.fake_steps import write_project
from helpers.places import ROOT
from onelayer.runtime.cli.options import parse_bytes, parse_limit, parse_target_modules
from onelayer.runtime.reporting.tables import table
from onelayer.runtime.sizes import size


def test_text_becomes_values() -> None:
    assert parse_bytes("24GiB") == 24 << 30
    assert (parse_bytes("1.5kb"), parse_bytes("7B"), parse_bytes("0")) == (1500, 7, 0)
    assert parse_bytes("8G") == parse_bytes("8GiB") == parse_bytes(str(8 << 30))
    with pytest.raises(typer.BadParameter, match="write 8GiB, or 8B"):
        parse_bytes("8")
    assert (parse_limit("none"), parse_limit("2.5")) == (None, 2.5)
    assert parse_target_modules("q_proj,v_proj") == ["q_proj", "v_proj"]
    assert parse_target_modules("q_proj") == ["q_proj"]
    assert parse_target_modules("all-linear") == "all-linear"
    assert parse_target_modules(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"


def test_numbers_are_formatted_for_people() -> None:
    assert [size(n) for n in (512, 1536, 3 << 29, 5 << 40)] == ["512 B", "1.50 KiB", "1.50 GiB", "5.00 TiB"]
    assert table([("a", 1), ("bbb", None)]) == "a    1\nbbb  -"


# Each takes longer to import than a dry run works.
HEAVY = {"torch", "transformers", "trl", "peft", "numpy", "psutil", "filelock"}


def run_python(code: str, home: Path) -> str:
    environment = os.environ | {
        "ONELAYER_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "compiler"), str(ROOT / "runtime")]),
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return result.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "MANIFEST", "--dry-run"], ["artifacts", "list"]]
)
def test_commands_that_compute_nothing_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    project = write_project(tmp_path)
    arguments = [str(project) if argument == "MANIFEST" else argument for argument in arguments]
    code = f"""
import sys
from onelayer.runtime.cli.main import main
try:
    main({arguments!r})
except SystemExit as ending:
    print("code", ending.code, sorted({HEAVY!r} & set(sys.modules)))
"""
    assert run_python(code, tmp_path / "home").splitlines()[-1] == "code 0 []"


def test_help_imports_no_pipeline(tmp_path: Path) -> None:
    code = """
import sys
from onelayer.runtime.cli.main import main
try:
    main(["--help"])
except SystemExit as ending:
    print("code", ending.code, [name for name in sys.modules if name.startswith("onelayer.runtime.pipeline")])
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "code 0 []"


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = ['onelayer']; runpy.run_module('onelayer.runtime', run_name='__main__')"
    assert "Usage: onelayer" in run_python(code, tmp_path)


def test_an_interrupt_while_importing_is_silent(tmp_path: Path) -> None:
    code = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "onelayer.runtime.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("onelayer.runtime", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "compiler"), str(ROOT / "runtime")])}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (130, "")
