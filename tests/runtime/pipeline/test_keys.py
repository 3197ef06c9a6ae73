"""Keys of the store that must not change, so that existing artifacts are found again."""

import json
from pathlib import Path

import pytest

from helpers.fake_steps import FakeSteps, Project
from helpers.media_files import picture
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.pipeline.steps import steps_of

EVERY_KIND = """
version: 1
model: {path: model}
emulator:
  calibration: {data: mix.jsonl, samples: 16, max_length: 64}
  ratio: 0.25
  refine: {steps: 7}
train: {lora: {r: 8}, args: {learning_rate: 1e-4, max_steps: 5}}
polish: {steps: 3}
direct: true
tasks:
  sql: {train: sql.jsonl, validation: support.jsonl, test: test.jsonl, merge: true}
  support: {train: support.jsonl, ratio: 0.1}
"""
KEYS = {
    "compile": "7d3afd65a179833525fc3faf302cb82cd3d23d4d20564295ea1a8b4b2eb22cef",
    "slice 0.1": "11b9a93c24648b7fdf51ed3549edb5b537594629678fc44e7461d99ab96b860c",
    "refine": "59324af49c0b6157e409f7e44c03c71964795e8b6964c121374c3510200f728e",
    "refine 0.1": "7dacac61d9403940012ac97002ad9a281fe8c6010e2ae61f20198f8a77d20422",
    "sql.train": "1ecab428bc86fcef5939236fa9b59b233d6c9c6a47dda091142368a5a1acda73",
    "sql.correct": "cc9ad97f8092847bbbbc052e4b0d8ff0e06283ce8c58e6fe3975c3c31c416d13",
    "sql.polish": "bee759a3719d581ef305e0e27ae707dc0d811f8095e6002c64451d28ae2e1be9",
    "sql.direct": "9630a318d112b7652e27c81c26cad536bb6e4c32730be23318f9b98e9a289f73",
    "sql.merge": "5a8427e38e3ff36939afb261b6d3e2ce62f3e249ac0e33e34c7509b506076656",
    "sql.evaluate": "64c21425350cead56ad3ffe744400a90be41919bcce3b62a337d95d2ba332a48",
    "support.train": "86b866afd3d7bcdde8d3f7ae48fda6a510f64156ffb0d7342719bfbf56430cfd",
    "support.correct": "286ab5b672565d70cabcec6921db5775c223a1bfb8bd4995dc2664c540d41542",
    "support.polish": "1e4a9c6ad72978a096584b5b369a9d418b035236ed6aa952b07e33f376488dd0",
    "support.direct": "dcad2dcde4721882012d1934648a477d27308c1518a57e2cf18c01fab609bdc0",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path, FakeSteps(monkeypatch))
    project.path.write_text(EVERY_KIND)
    return project


def test_the_keys_of_every_kind_of_step_stay(project: Project) -> None:
    result = run(project.manifest, project.store)
    assert not result.failed
    assert {step.name: step.key for step in result.steps} == KEYS


def test_columns_make_another_key_and_no_columns_none(project: Project) -> None:
    (project.path.parent / "sql.csv").write_text("question,answer\nx,y\n")
    keys = {}
    for data in (
        "sql.jsonl",
        "{path: sql.jsonl}",
        "{path: sql.csv, columns: {prompt: question, completion: answer}}",
        "{path: sql.csv, columns: {text: question}}",
    ):
        project.path.write_text(EVERY_KIND.replace("train: sql.jsonl", f"train: {data}"))
        steps = plan(project.manifest, project.store).steps
        keys[data] = next(step.key for step in steps if step.name == "sql.direct")
    first, second, *others = keys.values()
    assert first == second == KEYS["sql.direct"]
    assert len({first, *others}) == 3
    project.path.write_text(project.path.read_text().replace("polish: {steps: 3}", "polish: null"))
    assert not run(project.manifest, project.store).failed
    assert str(project.fakes.data["train sql"]) == f"{project.path.parent / 'sql.csv'} (columns text=question)"


def test_an_image_that_rows_name_is_part_of_the_key(project: Project) -> None:
    folder = project.path.parent
    row = {"image": "a.png", "prompt": "what?", "completion": "a cat"}
    (folder / "sql.jsonl").write_text(json.dumps(row) + "\n")
    keys = []
    for seed in (1, 2, 1):
        picture(seed=seed).save(folder / "a.png")
        steps = {step.name: step.key for step in plan(project.manifest, project.store).steps}
        keys.append(steps["sql.direct"])
        assert steps["support.direct"] == KEYS["support.direct"]
    assert keys[0] == keys[2] != keys[1]


def test_a_plan_names_the_keys_that_a_run_makes(project: Project) -> None:
    run(project.manifest, project.store)
    foreseen = {step.name: (step.state, step.key) for step in plan(project.manifest, project.store).steps}
    assert foreseen == {name: ("cached", key) for name, key in KEYS.items()}


def test_anchors_make_another_key_of_training_on_an_emulator_alone(project: Project) -> None:
    project.edit("train: {lora", "train: {anchor: none, lora")
    assert {step.name: step.key for step in run(project.manifest, project.store).steps} == KEYS
    project.edit("anchor: none", "anchor: {every: 10}")
    first = {step.name: step.key for step in run(project.manifest, project.store).steps}
    assert [name for name in KEYS if first[name] != KEYS[name] and name.endswith(("train", "direct"))] == [
        "sql.train",
        "support.train",
    ]
    project.edit("every: 10", "every: 10, bits: 1")
    second = {step.name: step.key for step in run(project.manifest, project.store).steps}
    assert second["sql.train"] not in (first["sql.train"], KEYS["sql.train"])
    settings = project.fakes.arguments["train sql"]
    assert (settings["anchor_every"], settings["anchor_bits"]) == (10, 1)
    assert Path(settings["model"]).name == "model"


def test_a_model_with_projectors_has_another_key_of_compile(project: Project) -> None:
    """Its emulators from before kept projectors dense; every other model keeps its keys."""
    config = project.path.parent / "model" / "config.json"
    config.write_text(json.dumps({"model_type": "fake", "text_config": {"model_type": "fake"}}))
    both = []
    for projectors in (True, False):
        compile_step = next(step for step in steps_of(project.manifest, ["sql"]) if step.kind == "compile")
        both.append(dict(compile_step.fields))
        assert ("projectors" in compile_step.fields) is projectors
        config.write_text(json.dumps({"model_type": "fake"}))
    assert {**both[1], "projectors": "compiled"} == both[0]


def test_the_default_learning_rate_is_part_of_the_key(project: Project) -> None:
    def key(args: str) -> str | None:
        project.path.write_text(EVERY_KIND.replace("{learning_rate: 1e-4, max_steps: 5}", args))
        return next(step.key for step in plan(project.manifest, project.store).steps if step.name == "sql.direct")

    assert (
        key("{max_steps: 5}")
        == key("{learning_rate: 1e-3, max_steps: 5}")
        != key("{learning_rate: 2e-4, max_steps: 5}")
    )
