"""`train.on: original`: tasks are trained on the original, in the way that the manifest says, without an emulator."""

from pathlib import Path

import pytest

from helpers.fake_steps import MANIFEST, FakeSteps, Project
from onelayer.compiler.errors import InputError
from onelayer.runtime.pipeline.run import run

EMULATOR = "emulator: {calibration: {data: mix.jsonl}, ratio: 0.25}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, FakeSteps(monkeypatch))


def test_the_original_is_trained_and_the_emulator_left_unused(project: Project) -> None:
    project.path.write_text(MANIFEST.replace("train: {", "train: {on: original, way: streamed, "))
    result = run(project.manifest, project.store)
    assert [step.name for step in result.steps] == ["sql.direct", "sql.evaluate", "support.direct"]
    assert project.fakes.arguments["train sql direct"]["way"] == "streamed"
    keys = {step.name: step.key for step in result.steps}
    project.fakes.taken()
    without = MANIFEST.replace(EMULATOR, "")
    project.path.write_text(without)
    again = run(project.manifest, project.store)
    assert {step.name: step.key for step in again.steps} == keys
    assert project.fakes.taken() == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train: {", "train: {on: original, anchor: {every: 3}, ", "train.anchor: train.on is original"),
        (
            "emulator: {calibration: {data: mix.jsonl}, ratio: 0.25}\ntrain: {",
            "train: {on: emulator, ",
            "train.on: there is",
        ),
        ("train: {", "train: {on: paper, ", "train.on"),
        ("train: {", "train: {way: disk, ", "train.way"),
    ],
)
def test_what_cannot_be_meant_is_refused(project: Project, old: str, new: str, message: str) -> None:
    project.path.write_text(MANIFEST.replace(old, new))
    with pytest.raises(InputError, match=message):
        _ = project.manifest
