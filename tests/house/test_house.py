"""The rules of the house that a script can see: who imports whom, sizes, typing marks, no surprise at import."""

import ast
import subprocess
import sys
from statistics import median

import pytest

import onelayer.compiler
import onelayer.runtime
from helpers.places import ROOT

PRODUCT = sorted(
    [*(ROOT / "compiler").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
)
PUBLIC = {*onelayer.compiler.__all__, *onelayer.runtime.__all__}
TORCH_FREE = [
    "onelayer.compiler",
    "onelayer.compiler.storage.checkpoint",
    "onelayer.compiler.storage.digests",
    "onelayer.compiler.errors",
    "onelayer.compiler.data.readers",
    "onelayer.compiler.storage.files",
    "onelayer.compiler.compile.settings",
    "onelayer.compiler.refine.settings",
    "onelayer.compiler.evaluate.settings",
    "onelayer.compiler.correct.settings",
    "onelayer.compiler.polish.settings",
    "onelayer.runtime.training.settings",
    "onelayer.runtime",
    "onelayer.runtime.store.store",
    "onelayer.runtime.cli.main",
    "onelayer.runtime.manifest.manifest",
    "onelayer.runtime.pipeline.run",
]


def test_the_compiler_never_imports_the_runtime() -> None:
    for path in (ROOT / "compiler").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("onelayer.runtime") for name in names), path


def test_the_namespace_root_is_shared() -> None:
    assert not (ROOT / "compiler/onelayer/__init__.py").exists()
    assert not (ROOT / "runtime/onelayer/__init__.py").exists()
    assert (ROOT / "compiler/onelayer/compiler/py.typed").is_file()
    assert (ROOT / "runtime/onelayer/runtime/py.typed").is_file()


def test_files_and_functions_stay_small() -> None:
    lines = {path: path.read_text().count("\n") for path in PRODUCT}
    assert median(lines.values()) < 150
    lines |= {path: path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert max(lines.values()) <= 300, max(lines, key=lambda path: lines[path])
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_no_function_takes_more_than_eight_parameters() -> None:
    """A public function shows its settings one by one; `self` and `cls` do not count."""
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in PUBLIC:
                names = [item.arg for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len(names) - (names[:1] in (["self"], ["cls"])) <= 8, f"{path}: {node.name}"


def test_every_file_says_what_it_is() -> None:
    for path in PRODUCT:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_architecture_is_named_in_the_compiler() -> None:
    import re

    from transformers import CONFIG_MAPPING

    families = {name for name in CONFIG_MAPPING if len(name) > 4} - {"encoder-decoder", "siglip", "mask2former"}
    for path in (ROOT / "compiler").rglob("*.py"):
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w-]+", node.value)
        }
        assert not strings & families, path


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
