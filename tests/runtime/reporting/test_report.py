"""The report of a run, and the results linked into the output folder."""

import errno
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import onelayer.compiler
from helpers.fake_steps import FakeSteps, write_project
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.outputs import LINKED_BYTES, link_outputs
from onelayer.runtime.pipeline.run import RunResult, run
from onelayer.runtime.reporting.html_report import write_report
from onelayer.runtime.reporting.run_figures import LinearError, MemoryRow, ReportData
from onelayer.runtime.reporting.svg_charts import bars, lines
from onelayer.runtime.store.prune import prune
from onelayer.runtime.store.store import ArtifactStore

VOID = {"meta", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Tags in their opening order, the text between them, and the attributes that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def project(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> tuple[Path, FakeSteps, ArtifactStore]:
    monkeypatch.setenv("ONELAYER_HOME", str(folder / "home"))
    fakes, path = FakeSteps(monkeypatch), write_project(folder)
    path.write_text(path.read_text() + more)
    return path, fakes, ArtifactStore(folder / "home")


def page_of(result: RunResult) -> Page:
    assert result.report is not None
    return Page(Path(result.report).read_text())


def test_a_run_leaves_a_page_that_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, store = project(tmp_path, monkeypatch)
    result = run(load_manifest(path), store)
    assert result.report is not None
    text = Path(result.report).read_text()
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import", text)
    assert 'name="viewport"' in text
    for words in (
        "Pipeline",
        "Held-out scores",
        "Memory against budget",
        "Use it",
        "corrected",
        f"onelayer run {path}",
    ):
        assert words in page.text
    for step in result.steps:
        assert step.name in page.text
        assert str(step.key)[:12] in page.text
    assert "AutoPeftModelForCausalLM.from_pretrained" in page.text


def test_a_failed_step_is_shown_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fakes, store = project(tmp_path, monkeypatch)
    fakes.fail["sql"] = MemoryError("no <room>")
    page = page_of(run(load_manifest(path), store))
    assert "MemoryError: no <room>" in page.text
    assert "needs sql.train, which did not succeed" in page.text


def test_charts_and_their_labels(tmp_path: Path) -> None:
    data = ReportData(
        steps=[],
        memory=[MemoryRow(step="compile", promised_gib=1.0, measured_gib=0.5)],
        errors=[LinearError(layer=n, kind=kind, rank=4, error=0.1 * n) for n in range(3) for kind in ("q", "k")],
        units=[],
        curves={"sql.train": [(1.0, 3.0), (2.0, 2.0)], "one": [(1.0, 2.5)], "broken": [(1.0, float("nan"))]},
        versions={"torch": "2"},
    )
    (tmp_path / "m.yaml").write_text("version: 1 # <&>\n")
    write_report(tmp_path / "report.html", tmp_path / "m.yaml", {"steps": [], "evaluations": {}}, data, 2 << 30)
    page = Page((tmp_path / "report.html").read_text())
    for words in ("layer", "relative error of the output", "training loss", "step", "budget", "predicted", "<&>"):
        assert words in page.text
    assert page.tags.count("polyline") == 5


def test_refined_layers_show_their_own_errors_and_no_linear_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fakes, store = project(tmp_path, monkeypatch)
    path.write_text(path.read_text().replace("ratio: 0.25}", "refine: {steps: 7}, ratio: 0.25}"))
    linears = [{"name": f"model.layers.{n}.mlp.up_proj", "rank": 4, "error": 0.123 + n} for n in range(2)]
    units = [{"name": f"model.layers.{n}", "before": 0.5 + n, "after": 0.25 + n} for n in range(2)]
    for name, document in (
        ("compile_emulator", {"linears": linears}),
        ("refine_emulator", {"linears": linears, "refined": {"units": units}}),
    ):
        real = getattr(fakes, name)

        def with_settings(*given: Any, real: Any = real, document: Any = document, **settings: Any) -> Any:
            result = real(*given, **settings)
            (settings.get("output", given[-1]) / "emulator.json").write_text(json.dumps(document))
            return result

        monkeypatch.setitem(onelayer.compiler.__dict__, name, with_settings)
    page = page_of(run(load_manifest(path), store))
    for words in ("For each layer of the emulator", "model.layers, as compiled", "model.layers, refined"):
        assert words in page.text
    assert "up_proj" not in page.text


def test_charts_without_data_are_empty() -> None:
    assert lines({}, "x", "y") == lines({"a": []}, "x", "y") == bars([], ("a",), "MiB") == ""
    assert "NaN" not in lines({"flat": [(1.0, 2.0), (1.0, 2.0)]}, "x", "y")


def test_results_are_linked_into_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, store = project(tmp_path, monkeypatch, "output: results\n")
    result = run(load_manifest(path), store)
    assert result.report == str(tmp_path / "results" / "report.html")
    adapter = tmp_path / "results" / "sql-corrected"
    source = next(Path(str(step.path)) for step in result.steps if step.name == "sql.correct")
    assert (adapter / "adapter_config.json").read_text() == (source / "adapter_config.json").read_text()
    first = json.loads((adapter / ".onelayer.json").read_text())["key"]
    path.write_text(path.read_text().replace("1e-4", "2e-4"))
    run(load_manifest(path), store)
    assert json.loads((adapter / ".onelayer.json").read_text())["key"] != first
    assert store.verify() == []


def test_the_report_keeps_what_other_runs_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one task, and a pruned store, take nothing from the page or from the results."""
    path, _, store = project(tmp_path, monkeypatch, "output: results\n")
    whole = page_of(run(load_manifest(path), store))
    assert "support.correct" in whole.text
    prune(store, keep=set())
    page = page_of(run(load_manifest(path), store, ["sql"]))
    for words in ("support.correct", "support.train", "in an earlier run", "sql.evaluate"):
        assert words in page.text
    for name in ("sql-corrected", "support-corrected"):
        folder = tmp_path / "results" / name
        assert f"from_pretrained('{folder}')" in page.text, "the report loads what pruning leaves"
        assert (folder / "adapter_model.safetensors").read_bytes()
    assert str(store.root) not in page.text
    path.write_text(path.read_text().replace("  support: {train: support.jsonl}\n", ""))
    assert "support.train" not in page_of(run(load_manifest(path), store)).text


def test_results_on_another_file_system_survive_a_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "large.bin").write_bytes(b"x" * LINKED_BYTES)

    def other_device(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", other_device)
    (tmp_path / "out").mkdir()
    (folder,) = link_outputs({"task": ("key", payload)}, tmp_path / "out")
    shutil.rmtree(payload)
    assert (folder / "large.bin").read_bytes() == b"x" * LINKED_BYTES


def test_a_foreign_folder_in_the_way_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fakes, store = project(tmp_path, monkeypatch, "output: results\n")
    (tmp_path / "results" / "sql-corrected").mkdir(parents=True)
    with pytest.raises(InputError, match="not created by a run"):
        run(load_manifest(path), store)
    assert fakes.taken() == []


def test_large_files_are_linked_small_ones_copied_foreign_ones_kept(tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    (payload / "sub").mkdir(parents=True)
    (payload / "sub" / "large.bin").write_bytes(b"x" * LINKED_BYTES)
    (payload / "small.json").write_text("{}")
    output = tmp_path / "out"
    output.mkdir()
    (folder,) = link_outputs({"task": ("key", payload)}, output)
    assert (folder / "sub" / "large.bin").stat().st_ino == (payload / "sub" / "large.bin").stat().st_ino
    assert (folder / "small.json").stat().st_ino != (payload / "small.json").stat().st_ino
    (output / "mine").mkdir()
    with pytest.raises(InputError, match="not created by a run"):
        link_outputs({"mine": ("key", payload)}, output)
    assert not (output / ".mine.partial").exists()
