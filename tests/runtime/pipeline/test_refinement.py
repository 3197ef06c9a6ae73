"""Refinement in manifests and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_steps import FakeSteps, Project
from helpers.mixtures import compiled, save_mixture
from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.inspect import inspect_path
from onelayer.compiler.models.unit_memory import training_bytes
from onelayer.compiler.refine.command import refine_emulator
from onelayer.runtime.cli.main import main
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.steps import refine_step
from onelayer.runtime.planning.pass_memory import refine_bytes
from onelayer.runtime.planning.read_shapes import shapes_from_headers

PLAIN = "emulator: {calibration: {data: mix.jsonl}, ratio: 0.25}"


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return Project(tmp_path, FakeSteps(monkeypatch))


def test_tasks_train_on_the_refined_emulator(project: Project) -> None:
    project.edit(PLAIN, PLAIN.replace("ratio: 0", "refine: {steps: 7}, ratio: 0"))
    assert project.run()[:3] == ["compile", "refine 7", "train sql"]
    assert project.fakes.arguments["refine"]["samples"] == 256
    assert project.run() == []
    project.edit("steps: 7", "steps: 8")
    assert project.reasons()["refine"] == "to run: field steps 7 -> 8"
    assert project.run()[:2] == ["refine 8", "train sql"]


def test_whose_inputs_it_learns_from_is_in_its_key_if_it_may_be_coded(project: Project) -> None:
    def fields(emulator: str, refine: str) -> dict[str, Any]:
        before = project.path.read_text()
        project.edit(PLAIN, f"emulator: {{calibration: {{data: mix.jsonl}}, {emulator}, refine: {{{refine}}}}}")
        manifest = load_manifest(project.path)
        project.path.write_text(before)
        assert manifest.emulator is not None
        assert manifest.emulator.refine is not None
        return dict(refine_step(manifest, manifest.emulator, manifest.emulator.refine, None).fields)

    assert "inputs" not in fields("ratio: 0.25", "")
    assert "inputs" not in fields("ratio: 0.25", "inputs: original")
    assert fields("ratio: 0.25", "inputs: emulator")["inputs"] == "emulator"
    assert fields("keep_bytes: 0.145", "")["inputs"] == "auto"
    assert fields("keep_bytes: 0.145", "inputs: original")["inputs"] == "original"
    rates = [fields(size, "")["learning_rate"] for size in ("ratio: 0.25", "keep_bytes: 0.145")]
    assert rates == [0.01, "auto"]
    assert fields("keep_bytes: 0.145", "learning_rate: 0.01")["learning_rate"] == 0.01


def test_returning_to_an_earlier_setting_runs_nothing(project: Project) -> None:
    project.run()
    project.edit(PLAIN, PLAIN.replace("ratio: 0", "refine: {}, ratio: 0"))
    assert project.run()[0] == "refine 100"
    project.edit(", refine: {}", "")
    assert project.run() == []


def test_a_slice_gets_its_own_refinement(project: Project) -> None:
    project.edit(PLAIN, PLAIN.replace("ratio: 0", "refine: {steps: 7}, ratio: 0"))
    project.edit("{train: support.jsonl}", "{train: support.jsonl, ratio: 0.1}")
    assert project.run()[:4] == ["compile", "slice 0.1", "refine 7", "refine 7"]
    names = [step.name for step in plan(project.manifest, project.store).steps]
    assert names[:4] == ["compile", "slice 0.1", "refine", "refine 0.1"]
    assert project.run() == []


def test_its_memory_is_predicted_before_it_runs(tmp_path: Path, project: Project) -> None:
    model = tmp_path / "real"
    save_tiny("llama", model)
    project.edit("path: model", "path: real")
    project.edit(PLAIN, PLAIN.replace("ratio: 0", "refine: {}, ratio: 0"))
    step = next(step for step in plan(load_manifest(project.path)).steps if step.name == "refine")
    shapes = shapes_from_headers(model)
    assert step.peak_bytes == refine_bytes(shapes, 0.25, 512, "uniform")
    assert step.read_bytes is not None
    assert step.read_bytes > shapes.parameters * shapes.value_bytes


def test_the_bound_counts_what_is_trained_and_the_graph() -> None:
    assert training_bytes([100, 300], 10 * 40, 2, True) == 26 * 400 + 16 * 300 + 2 * 10 * 40 * 4
    # On a host twice as much, for holes in the heap.
    assert training_bytes([100, 300], 10 * 40, 2, False) == 26 * 400 + 16 * 300 + 4 * 10 * 40 * 4


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text(
        "".join(json.dumps({"text": "a quick brown fox " * n}) + "\n" for n in (1, 2, 3))
    )
    compile_emulator(tmp_path / "model", tmp_path / "mix.jsonl", tmp_path / "emulator", ratio=0.4, max_length=16)
    given = ["refine", str(tmp_path / "emulator"), "--model", str(tmp_path / "model"), "--max-length", "16"]
    given += ["--calibration", str(tmp_path / "mix.jsonl"), "--steps", "10"]
    assert exit_code(*given, "--output", str(tmp_path / "refined")) == 0
    assert "2 of 2 layers are closer to the original's" in capsys.readouterr().out
    assert exit_code(*given, "--output", str(tmp_path / "again"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [unit["name"] for unit in document["units"]] == ["model.layers.0", "model.layers.1"]
    assert exit_code(*given, "--output", str(tmp_path / "refined")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_refined_emulator_lists_no_outdated_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_mixture("mixtral", tmp_path)
    compiled(tmp_path, factor_dtype="nf4")
    given: dict[str, Any] = {"model": tmp_path / "model", "calibration": tmp_path / "mix.jsonl", "steps": 5}
    result = refine_emulator(tmp_path / "emulator", output=tmp_path / "refined", **given)
    before, after = (inspect_path(tmp_path / name) for name in ("emulator", "refined"))
    assert after["refined"]["units"] == [unit.model_dump(mode="json") for unit in result.units]
    errors = {"error", "optimal_error", "unquantised_error", "prefix_errors", "dense_error", "gradient_error"}
    assert len(before["linears"]) == 8
    for one, other in zip(before["linears"], after["linears"], strict=True):
        assert errors < one.keys()
        assert other == {field: value for field, value in one.items() if field not in errors}
    assert after["stacks"] == before["stacks"]  # experts are unchanged
    cards = [(tmp_path / name / "README.md").read_text() for name in ("emulator", "refined")]
    assert "how far each linear is from the original" in " ".join(cards[0].split())
    assert "how far each linear is" not in " ".join(cards[1].split())
    assert "how far each layer was from the original" in " ".join(cards[1].split())
    assert exit_code("inspect", str(tmp_path / "refined")) == 0
    shown = capsys.readouterr().out
    assert f"{result.units[0].after:.4f}"[:5] in shown
    assert "model.layers.1.self_attn.q_proj" in shown


@pytest.mark.parametrize(
    ("size", "refined"),
    [
        ("ratio: 0.25", False),
        ("keep_bytes: 0.25", True),
        ("keep_bytes: 0.25, refine: none", False),
        ("ratio: 0.25, refine: {}", True),
    ],
)
def test_an_emulator_of_some_bytes_is_refined_without_anchors(
    project: Project, tmp_path: Path, size: str, refined: bool
) -> None:
    project.edit("train: {", "train: {anchor: none, ")
    save_tiny("llama", tmp_path / "real")
    project.edit("path: model", "path: real")
    project.edit("ratio: 0.25", size)
    steps = [step.name for step in plan(project.manifest, project.store).steps]
    assert ("refine" in steps) == refined
