"""`train.on: auto`: a run trains on what is faster on this machine, and stays with it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.fake_steps import MANIFEST, FakeSteps, Project
from helpers.model_shapes import decoder
from onelayer.compiler.errors import InputError
from onelayer.runtime.pipeline import emulator_size
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import Speed
from onelayer.runtime.reporting.run_summaries import plan_steps_summary

SHAPES = decoder(2048, 5632, 24, 32000)
AUTO = MANIFEST.replace("ratio: 0.25", "memory: 2GiB").replace(
    "train: {", "train: {on: auto, activations: {where: layer}, "
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(emulator_size, "shapes_from_headers", lambda directory, image_side=None: SHAPES)
    return Project(tmp_path, FakeSteps(monkeypatch))


def measure(monkeypatch: pytest.MonkeyPatch, disk: float) -> list[int]:
    """Let this machine read so many bytes a second; returns a list with an entry for each measurement."""
    measured: list[int] = []

    def speed(directory: Path, shapes: ModelShapes, tokens: int) -> Speed:
        measured.append(tokens)
        return Speed(read_bytes_per_second=disk, flops_per_second=1e13, device="typed in")

    monkeypatch.setattr(emulator_size, "try_speed", speed)
    return measured


def names(project: Project) -> list[str]:
    return [step.name for step in run(project.manifest, project.store).steps]


def test_few_steps_are_done_on_the_original(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.path.write_text(AUTO)
    measured = measure(monkeypatch, disk=1e11)
    foreseen = plan(project.manifest, project.store)
    assert foreseen.note is not None
    assert "the run measures this machine first" in plan_steps_summary(foreseen.model_dump(mode="json"))
    assert "compile" in {step.name for step in foreseen.steps}
    assert not measured, "a dry run measures nothing"
    assert names(project) == ["sql.direct", "sql.evaluate", "support.direct"]
    assert len(measured) == 1
    slow = measure(monkeypatch, disk=1e6)
    assert names(project) == ["sql.direct", "sql.evaluate", "support.direct"]
    assert not slow, "what was decided is kept"
    decided = plan(project.manifest, project.store)
    assert decided.note == "train.on is auto: the original is faster"
    assert {step.state for step in decided.steps} == {"cached"}


def test_runs_that_begin_together_decide_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second measurement finds another speed here, and would train tasks of one manifest on two things."""
    project.path.write_text(AUTO)
    disks = iter([1e11, 1e6])

    def speed(directory: Path, shapes: ModelShapes, tokens: int) -> Speed:
        time.sleep(0.02)
        return Speed(read_bytes_per_second=next(disks), flops_per_second=1e13, device="typed in")

    monkeypatch.setattr(emulator_size, "try_speed", speed)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda _: emulator_size.decided(project.manifest, project.store, True), range(2))
    assert [note for _, note in found] == ["train.on is auto: the original is faster"] * 2


def test_many_steps_or_a_slow_disk_are_for_the_emulator(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, disk=1e8)
    project.path.write_text(AUTO.replace("max_steps: 5", "max_steps: 50000"))
    assert "compile" in names(project)
    project.path.write_text(AUTO.replace("max_steps: 5", "num_train_epochs: 1"))
    assert "compile" in names(project)


def test_keys_are_those_of_what_was_chosen(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, disk=1e11)
    project.path.write_text(AUTO)
    keys = {step.name: step.key for step in run(project.manifest, project.store).steps}
    project.path.write_text(AUTO.replace("on: auto", "on: original"))
    assert {step.name: step.key for step in plan(project.manifest, project.store).steps} == keys


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory: 2GiB", "keep_bytes: 0.2", "train.on: auto chooses between original and emulator for a card"),
        ("{train: support.jsonl}", "{train: support.jsonl, ratio: 0.1}", "a slice needs the emulator, set train.on"),
    ],
)
def test_what_cannot_be_chosen_is_refused(project: Project, old: str, new: str, message: str) -> None:
    project.path.write_text(AUTO.replace(old, new))
    with pytest.raises(InputError, match=message):
        _ = project.manifest
