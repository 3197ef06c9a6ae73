"""The remains of an interrupted step: resumed if they fit, and never in the way of the next attempt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import onelayer.compiler
from helpers.fake_steps import Document, FakeSteps, Project
from onelayer.compiler.storage.work_directory import WorkKind, work_directory
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore


def spec(**fields: Any) -> StepSpec:
    return StepSpec(kind="train", step_version=1, fields=fields, inputs={"data": "d" * 64})


def fill(payload: Path) -> Mapping[str, Any]:
    assert not payload.exists()
    payload.mkdir()
    (payload / "weights.bin").write_bytes(b"w" * 1000)
    return {"report": {"peak_device_bytes": 7, "peak_host_bytes": 8}}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_a_resumable_step_finds_its_work_and_does_not_publish_it(store: ArtifactStore) -> None:
    def interrupted(payload: Path) -> Mapping[str, Any]:
        work = payload.with_name(".payload.training")
        work.mkdir()
        (work / "checkpoint").write_text("step 3")
        raise KeyboardInterrupt

    def resumed(payload: Path) -> Mapping[str, Any]:
        payload.mkdir()
        (payload / "adapter").write_text((payload.with_name(".payload.training") / "checkpoint").read_text())
        return {}

    with pytest.raises(KeyboardInterrupt):
        store.ensure(spec(), interrupted, resumable=True)
    assert store.artifacts() == []
    artifact, _ = store.ensure(spec(), resumed, resumable=True)
    assert list(artifact.files) == ["adapter"]
    assert sorted(path.name for path in (store.root / artifact.key).iterdir()) == ["artifact.json", "payload"]


def test_the_payload_of_a_failed_step_does_not_block_the_next_attempt(store: ArtifactStore) -> None:
    def failing(payload: Path) -> Mapping[str, Any]:
        fill(payload)
        raise RuntimeError("step 2: the loss is not finite")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="not finite"):
            store.ensure(spec(), failing, resumable=True)
    artifact, made = store.ensure(spec(), fill, resumable=True)
    assert made
    assert list(artifact.files) == ["weights.bin"]


def test_a_complete_but_undescribed_payload_is_not_made_again(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(payload: Path) -> Mapping[str, Any]:
        raise AssertionError("made twice")

    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onelayer.runtime.store.store.file_digest", killed)
        with pytest.raises(KeyboardInterrupt):
            store.ensure(spec(), fill, resumable=True)
    artifact, made = store.ensure(spec(), never, resumable=True)
    assert made
    assert artifact.peak_device_bytes == 7
    assert sorted(path.name for path in (store.root / artifact.key).iterdir()) == ["artifact.json", "payload"]


@pytest.mark.parametrize(("batch_size", "kept"), [(4, True), (1, False)])
def test_work_begun_with_other_facts_is_discarded(store: ArtifactStore, batch_size: int, kept: bool) -> None:
    found = []

    def make(payload: Path) -> Mapping[str, Any]:
        work = payload.with_name(".payload.compile")
        found.append(work.exists())
        if len(found) == 1:
            work.mkdir()
            raise KeyboardInterrupt
        return fill(payload)

    with pytest.raises(KeyboardInterrupt):
        store.ensure(spec(), make, resumable=True, begun_with={"batch_size": 4})
    store.ensure(spec(), make, resumable=True, begun_with={"batch_size": batch_size})
    assert found == [False, kept]


def refused_if_other(output: Path, **begun: Any) -> None:
    """Do as a compile does: resume work that was begun with the same facts, and refuse other work."""
    with work_directory(output, WorkKind("compile", finished="unit-*"), begun) as work:
        if not (work / "unit-0").exists():
            (work / "unit-0").touch()
            raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["batch size", "the model's folder"])
def test_settings_without_effect_on_the_result_may_change_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    project = Project(tmp_path, FakeSteps(monkeypatch))
    project.path.write_text(project.path.read_text() + "stream: {batch_size: 4}\n")
    attempts = []

    def compile_emulator(model: str, calibration: list[str], output: Path, **settings: Any) -> Document:
        attempts.append(model)
        if len(attempts) <= 2:
            refused_if_other(output, model=model, batch_size=settings["batch_size"])
        return project.fakes.compile_emulator(model, calibration, output, **settings)

    monkeypatch.setitem(onelayer.compiler.__dict__, "compile_emulator", compile_emulator)
    with pytest.raises(KeyboardInterrupt):
        run(project.manifest, project.store)
    if change == "batch size":
        project.edit("batch_size: 4", "batch_size: 1")
    else:
        (tmp_path / "model").rename(tmp_path / "moved")
        project.edit("path: model", "path: moved")
    with pytest.raises(KeyboardInterrupt):  # started over, since the old work would have been refused
        run(project.manifest, project.store)
    assert not run(project.manifest, project.store).failed
    assert len(attempts) == 3
