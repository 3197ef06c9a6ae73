"""The house rules that a script can check: imports, sizes, typing marks, and no side effects at import."""

import ast
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import onelayer.compiler
import onelayer.runtime
from helpers.fake_steps import write_project
from helpers.places import ROOT

PRODUCT = sorted(
    [*(ROOT / "compiler").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PUBLIC = {*onelayer.compiler.__all__, *onelayer.runtime.__all__}
# Modules that a dry run and `--help` import: whole wings, the settings of every pass, and single modules of other
# wings.
LIGHT = {
    "compiler": (
        "adapters/config adapters/keys adapters/reader conversations/* correct/candidates correct/memory data/pairs "
        "data/readers data/rows data/tokens documents "
        "codes/forms dequantize/block_floats dequantize/checkpoint dequantize/formats dequantize/integers "
        "dequantize/libraries dequantize/packed errors "
        "factors/ranks factors/stored_forms "
        "faults inspect machine/console machine/distributed machine/hardware machine/meter machine/primitives media/* "
        "models/built models/unit_memory results settings sources/* storage/* */settings"
    ),
    "runtime": (
        "cli/* manifest/* modules/import_hook pipeline/* planning/* reporting/* sizes store/* version "
        "training/trainer_args */settings"
    ),
}
PACKAGES = {house: ROOT / house / "onelayer" / house for house in LIGHT}
TORCH_FREE = sorted(
    ".".join(file.relative_to(ROOT / house).with_suffix("").parts).removesuffix(".__init__")
    for house, patterns in LIGHT.items()
    for pattern in ["__init__", "*/__init__", *patterns.split()]
    for file in PACKAGES[house].glob(f"{pattern}.py")
    if file.parent == PACKAGES[house] or pattern == "*/__init__" or file.stem != "__init__"
)


def test_the_namespace_root_is_shared() -> None:
    assert not (ROOT / "compiler/onelayer/__init__.py").exists()
    assert not (ROOT / "runtime/onelayer/__init__.py").exists()
    assert (ROOT / "compiler/onelayer/compiler/py.typed").is_file()
    assert (ROOT / "runtime/onelayer/runtime/py.typed").is_file()


@cache
def trees() -> dict[Path, ast.Module]:
    """Parse every file once. Collecting garbage meanwhile would take twice as long as the parsing."""
    gc.disable()
    try:
        return {path: ast.parse(path.read_text()) for path in [*PRODUCT, *TESTS]}
    finally:
        gc.enable()


def parsed(path: Path) -> ast.Module:
    return trees()[path]


@cache
def statements(path: Path) -> tuple[ast.AST, ...]:
    """List the statements of a file at every depth. Expressions, most of its nodes, hold none."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        ]
    return tuple(found)


def functions(paths: list[Path]) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in paths:
        for node in statements(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_files_stay_small() -> None:
    lines = {path: path.read_text().count("\n") for path in [*PRODUCT, *TESTS]}
    assert max(lines.values()) <= 300, max(lines, key=lambda path: lines[path])
    assert median(lines[path] for path in PRODUCT if path.name != "__init__.py") <= 125


def test_functions_stay_small() -> None:
    for path, node in functions([*PRODUCT, *TESTS]):
        assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_tests_mirror_the_house() -> None:
    """The tests of a wing are in a folder of its name; each file has a subject, and no test imports another."""
    for house in PACKAGES:
        wings = {path.name for path in PACKAGES[house].iterdir() if path.is_dir()}
        folders = {path.name for path in (ROOT / "tests" / house).iterdir() if path.name != "__pycache__"}
        assert folders == wings - {"__pycache__"}
    for path in TESTS:
        assert not path.stem.endswith("_more"), path
        for node in statements(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(part.startswith("test_") for name in names for part in name.split(".")), path


def test_names_of_tests_stay_short() -> None:
    for path, node in functions(TESTS):
        assert not node.name.startswith("test_") or len(node.name) <= 70, f"{path}: {node.name}"


def test_no_function_takes_more_than_eight_parameters() -> None:
    """A public function lists its settings one by one, so it is exempt; `self` and `cls` do not count."""
    for path, node in functions(PRODUCT):
        if node.name not in PUBLIC:
            names = [item.arg for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len(names) - (names[:1] in (["self"], ["cls"])) <= 8, f"{path}: {node.name}"


def test_every_file_has_a_docstring() -> None:
    for path in PRODUCT:
        assert ast.get_docstring(parsed(path)), path


def test_no_architecture_is_named_in_the_compiler() -> None:
    import re

    from transformers import CONFIG_MAPPING

    families = {name for name in CONFIG_MAPPING if len(name) > 4} - {"encoder-decoder", "siglip", "mask2former"}
    for path in (ROOT / "compiler").rglob("*.py"):
        strings = {
            node.value
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w-]+", node.value)
        }
        assert not strings & families, path


def run_python(code: str, *arguments: str) -> Any:
    """Return the JSON that a fresh process prints on its last line."""
    paths = os.pathsep.join(str(ROOT / house) for house in LIGHT)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", code, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def heavy() -> list[str]:
    """List the supposedly light modules that import torch or transformers.

    A child process tries each one first, so that the parent has imported only modules that are light.
    """
    code = """
import importlib, json, os, sys
heavy = []
for module in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.import_module(module)
        os._exit(bool({"torch", "transformers"} & set(sys.modules)))
    if os.waitpid(child, 0)[1]:
        heavy.append(module)
    else:
        importlib.import_module(module)
print(json.dumps(heavy))
"""
    found: list[str] = run_python(code, *TORCH_FREE)
    return found


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_import_torch(module: str, heavy: list[str]) -> None:
    assert module not in heavy


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "MANIFEST", "--dry-run"]])
def test_a_dry_run_imports_only_light_modules(arguments: list[str], tmp_path: Path) -> None:
    project = str(write_project(tmp_path))
    code = """
import json, sys
from onelayer.runtime.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ending:
    assert ending.code == 0
print(json.dumps([name for name in sys.modules if name.startswith("onelayer.")]))
"""
    imported = run_python(code, *(project if argument == "MANIFEST" else argument for argument in arguments))
    assert "onelayer.runtime.cli.runs" in imported
    assert set(imported) <= set(TORCH_FREE)
