"""Reuse of one emulator, on this machine and on another: slices, budgets, resumed compiles, and what a plan shows."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from helpers.fake_steps import FakeSteps, write_model, write_project
from helpers.places import ROOT
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import BEGUN_WITH, ArtifactStore


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSteps:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    return FakeSteps(monkeypatch)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def go(path: Path, home: Path, fakes: FakeSteps) -> list[str]:
    """Run a manifest and return which step functions were called."""
    assert not run(load_manifest(path), ArtifactStore(home)).failed
    return fakes.taken()


def test_a_smaller_ratio_is_sliced_from_the_larger_emulator(tmp_path: Path, fakes: FakeSteps) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    go(path, home, fakes)
    edit(path, "ratio: 0.25", "ratio: 0.1")
    first = plan(load_manifest(path), ArtifactStore(home)).steps[0]
    assert first.reason == "field ratio 0.25 -> 0.1; sliced from the emulator of ratio 0.25 in the store"
    assert go(path, home, fakes)[:2] == ["slice 0.1", "train sql"]
    edit(path, "ratio: 0.1", "ratio: 0.3")  # larger than every stored emulator, so compiled
    assert go(path, home, fakes)[0] == "compile"


@pytest.mark.parametrize("change", ["data: mix.jsonl, samples: 32}, ratio: 0.1", "data: sql.jsonl}, ratio: 0.1"])
def test_an_emulator_of_anything_else_is_not_sliced(tmp_path: Path, fakes: FakeSteps, change: str) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    go(path, home, fakes)
    edit(path, "data: mix.jsonl}, ratio: 0.25", change)
    assert go(path, home, fakes)[0] == "compile"


def test_quantized_emulators_are_compiled_again(tmp_path: Path, fakes: FakeSteps) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    edit(path, "ratio: 0.25", "factor_dtype: nf4, ratio: 0.5")
    go(path, home, fakes)
    edit(path, "ratio: 0.5", "ratio: 0.1")
    assert go(path, home, fakes)[0] == "compile"


def test_a_task_may_train_on_a_slice(tmp_path: Path, fakes: FakeSteps) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    edit(path, "support: {train: support.jsonl", "support: {train: support.jsonl, ratio: 0.1")
    calls = go(path, home, fakes)
    assert calls[:2] == ["compile", "slice 0.1"]
    assert go(path, home, fakes) == []
    edit(path, "ratio: 0.1", "ratio: 0.3")
    with pytest.raises(InputError, match=r"tasks\.support\.ratio: must be below 0\.25"):
        load_manifest(path)


def test_without_an_emulator_training_is_on_the_original(tmp_path: Path, fakes: FakeSteps) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    edit(path, "emulator: {calibration: {data: mix.jsonl}, ratio: 0.25}\n", "")
    edit(path, "test: test.jsonl}", "test: test.jsonl, merge: true}")
    assert go(path, home, fakes) == ["train sql direct", "merge", "evaluate 1", "train support direct"]


def test_a_store_copied_to_another_machine_is_recognized(tmp_path: Path, fakes: FakeSteps) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write_project(folder)
    go(here / "m.yaml", here / "home", fakes)
    shutil.copytree(here / "home" / "artifacts", there / "home" / "artifacts")
    assert go(there / "m.yaml", there / "home", fakes) == []
    assert {step.reason for step in plan(load_manifest(there / "m.yaml"), ArtifactStore(there / "home")).steps} == {
        "made before from the same inputs and settings"
    }


def test_a_budget_and_a_ratio_together_are_refused(tmp_path: Path, fakes: FakeSteps) -> None:
    path = write_project(tmp_path)
    edit(path, "ratio: 0.25", "memory: 24GiB")
    assert load_manifest(path).emulator is not None
    edit(path, "memory: 24GiB", "memory: 24GiB, ratio: 0.2")
    with pytest.raises(InputError, match=r"emulator\.memory: ratio is given too, keep one of them"):
        load_manifest(path)


def test_variables_of_the_environment(tmp_path: Path, fakes: FakeSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_project(tmp_path)
    edit(path, "path: model", 'path: "${MODEL_HOME}/model"')
    edit(path, "max_steps: 5", 'max_steps: "${STEPS:-7}"')
    with pytest.raises(InputError, match=r"model\.path: the environment variable MODEL_HOME is not set"):
        load_manifest(path)
    monkeypatch.setenv("MODEL_HOME", ".")
    manifest = load_manifest(path)
    assert manifest.model.path == str(tmp_path / "model")
    assert manifest.train.args["max_steps"] == 7
    monkeypatch.setenv("STEPS", "9")
    assert load_manifest(path).train.args["max_steps"] == 9


def test_an_interrupted_compile_resumes_unless_the_libraries_changed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    spec = StepSpec(kind="compile", step_version=1, fields={}, inputs={})
    seen: list[bool] = []

    def interrupted(payload: Path) -> Mapping[str, Any]:
        work = payload.with_name(".payload.compile")
        seen.append(work.exists())
        work.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.ensure(spec, interrupted, resumable=True)
    (partial,) = store.root.glob("*.partial")
    (partial / BEGUN_WITH).write_text(json.dumps({"torch": "0.1"}))
    with pytest.raises(KeyboardInterrupt):
        store.ensure(spec, interrupted, resumable=True)
    assert seen == [False, True, False]


def test_a_dry_run_shows_bytes_and_peaks_without_torch(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    path = write_project(tmp_path / "project")
    shutil.rmtree(path.parent / "model")
    tiny_models.build("LlamaConfig", "LlamaForCausalLM", **tiny_models.DECODER).save_pretrained(path.parent / "model")
    code = (
        "import sys; from onelayer.runtime.cli.main import main\n"
        f"try: main(['run', {str(path)!r}, '--dry-run', '--json'])\n"
        "except SystemExit: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    paths = os.pathsep.join(str(ROOT / name) for name in ("compiler", "runtime"))
    environment = os.environ | {"ONELAYER_HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    steps = {step["name"]: step for step in json.loads(result.stdout)["steps"]}
    model_bytes = (path.parent / "model" / "model.safetensors").stat().st_size
    assert 0.9 * model_bytes < steps["compile"]["read_bytes"] <= model_bytes
    assert 0 < steps["compile"]["write_bytes"] < model_bytes
    assert steps["sql.train"]["peak_bytes"] > steps["compile"]["write_bytes"]
    assert steps["sql.evaluate"]["read_bytes"] == steps["compile"]["read_bytes"]
    assert steps["sql.evaluate"]["state"] == "to run"


def test_costs_of_a_model_without_linears_are_unknown(tmp_path: Path, fakes: FakeSteps) -> None:
    path = write_project(tmp_path)
    assert {step.peak_bytes for step in plan(load_manifest(path), ArtifactStore(tmp_path / "home")).steps} == {None}


def test_an_emulator_of_another_model_is_not_sliced(tmp_path: Path, fakes: FakeSteps) -> None:
    path, home = write_project(tmp_path), tmp_path / "home"
    go(path, home, fakes)
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", "another")
    edit(path, "ratio: 0.25", "ratio: 0.1")
    assert go(path, home, fakes)[0] == "compile"
