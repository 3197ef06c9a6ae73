"""The manifest: what is accepted, how defaults and overrides merge, and how each mistake is named with its place."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.places import ROOT
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import Manifest, check_tasks, load_manifest, manifest_schema
from onelayer.runtime.manifest.sections import Anchor, Emulator
from onelayer.runtime.pipeline.steps import steps_of

GOOD = """
version: 1
model: {path: model}
emulator: {calibration: {data: mix.jsonl}}
train: {lora: {r: 8, alpha: 16}, args: {learning_rate: 1e-4, max_steps: 500}}
tasks:
  sql: {train: sql.jsonl, test: sql.jsonl}
  support: {train: sql.jsonl, lora: {r: 4}, args: {max_steps: 200, weight_decay: 1e-2}, max_length: 64, merge: true}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("mix.jsonl", "sql.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    return tmp_path


def load(folder: Path, text: str) -> Manifest:
    (folder / "m.yaml").write_text(text)
    return load_manifest(folder / "m.yaml")


def emulator_of(manifest: Manifest) -> Emulator:
    assert manifest.emulator is not None
    return manifest.emulator


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_are_relative_to_the_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    manifest = load(folder, GOOD)
    assert manifest.model.path == str(folder / "model")
    assert emulator_of(manifest).calibration.data == (str(folder / "mix.jsonl"),)
    assert manifest.tasks["sql"].train == (str(folder / "sql.jsonl"),)
    assert manifest.path == folder / "m.yaml"


def test_defaults_are_those_of_the_commands(folder: Path) -> None:
    manifest = load(folder, GOOD)
    calibration = emulator_of(manifest).calibration
    emulator = emulator_of(manifest)
    assert (emulator.share, emulator.ratio, emulator.memory, emulator.allocation) == (0.25, None, None, "spectrum")
    assert emulator.model_copy(update={"ratio": 0.25}).allocation == "uniform"
    assert (calibration.samples, calibration.max_length) == (64, 512)
    assert (manifest.correct.limit, manifest.seed, manifest.direct) == ("default", 0, False)


def test_args_and_lora_merge_key_by_key_and_the_rest_replaces(folder: Path) -> None:
    manifest = load(folder, GOOD)
    sql, support = manifest.training("sql"), manifest.training("support")
    assert (sql.lora.r, sql.lora.alpha, sql.max_length) == (8, 16, 512)
    assert sql.args == {"learning_rate": 1e-4, "max_steps": 500}
    assert (support.lora.r, support.lora.alpha, support.max_length) == (4, 16, 64)
    assert support.args == {"learning_rate": 1e-4, "max_steps": 200, "weight_decay": 0.01}


def test_null_takes_a_default_argument_away(folder: Path) -> None:
    text = GOOD.replace("args: {max_steps: 200, ", "args: {max_steps: null, num_train_epochs: 2, ")
    args = load(folder, text).training("support").args
    assert args == {"learning_rate": 1e-4, "num_train_epochs": 2.0, "weight_decay": 0.01}


@pytest.mark.parametrize("number", ["1e-4", "'1e-4'", "0.0001", "1.0e-4"])
def test_every_way_of_writing_a_small_number_is_a_number(folder: Path, number: str) -> None:
    args = load(folder, GOOD.replace("learning_rate: 1e-4", f"learning_rate: {number}")).train.args
    assert args["learning_rate"] == 1e-4
    assert isinstance(args["learning_rate"], float)


def test_two_settings_for_when_to_stop_are_refused(folder: Path) -> None:
    message = complaint(folder, GOOD.replace("args: {max_steps: 200, ", "args: {num_train_epochs: 2, "))
    assert "tasks.support.args: max_steps and num_train_epochs both set when to stop" in message


def test_arguments_that_training_refuses_are_refused_at_once(folder: Path) -> None:
    text = GOOD.replace("max_steps: 500", "max_steps: 500, completion_only_loss: true, push_to_hub: true")
    message = complaint(folder, text)
    assert "train.args.completion_only_loss: cannot be set here" in message
    assert "train.args.push_to_hub: cannot be set here" in message


def test_every_error_at_once_each_with_its_place(folder: Path) -> None:
    text = """
version: 2
model: {path: ./nowhere}
emulator: {calibration: {data: [mix.jsonl, gone.jsonl]}, ratio: 7, memery: 24GiB}
correct: {limt: 3}
train: {lora: {r: eight}, args: {seed: 3, max_steps: many}}
tasks:
  sql: {trian: sql.jsonl, args: {lerning_rate: 1}}
"""
    message = complaint(folder, text)
    for part in (
        "version: input should be 1, not 2",
        "model.path: ./nowhere: no such directory",
        "emulator.calibration.data[1]: gone.jsonl: no such file",
        "emulator.ratio: input should be less than 1, not 7",
        "emulator.memery: unknown field, nearest is `memory`",
        "correct.limt: unknown field, nearest is `limit`",
        "train.lora.r: input should be a valid integer",
        "train.args.seed: not here, set the manifest's top-level `seed`",
        "train.args.max_steps: input should be a valid integer",
        "tasks.sql.train: required",
        "tasks.sql.trian: unknown field, nearest is `train`",
        "tasks.sql.args.lerning_rate: unknown field, nearest is `learning_rate`",
    ):
        assert part in message
    assert message.count("; ") == 11


def test_duplicate_keys_are_refused_wherever_they_are(folder: Path) -> None:
    message = complaint(folder, GOOD.replace("{r: 8, alpha: 16}", "{r: 8, alpha: 16, r: 4}") + "seed: 1\nseed: 2\n")
    assert "train.lora.r: given twice, on lines 5 and 5" in message
    assert "seed: given twice, on lines 9 and 10" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "a manifest is a mapping"),
        ("- 1", "a manifest is a mapping"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        (GOOD.replace("sql:", "no/path:"), "tasks"),
        (GOOD.replace("tasks:", "tasks: {}\nother:"), "tasks: "),
        (GOOD + "correct: {limit: null}", "correct.limit: write a number, `none`"),
        (GOOD + "correct: {limit: -1}", "correct.limit: "),
        (GOOD + "correct: {limit: .nan}", "correct.limit: "),
        (GOOD.replace("mix.jsonl", "model.csv"), "model.csv: no such file"),
        (GOOD.replace("{r: 4}", "{target_modules: 3}"), "tasks.support.lora.target_modules: write `all-linear`"),
    ],
)
def test_a_bad_manifest_is_one_line(folder: Path, text: str, part: str) -> None:
    assert part in complaint(folder, text)


def test_an_alias_of_itself_is_refused_not_followed(folder: Path) -> None:
    assert "m.yaml" in complaint(folder, "a: &a\n  b: *a\n")


def test_a_missing_manifest_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_manifest(tmp_path / "none.yaml")


def test_limit_auto_needs_held_out_data_for_every_task(folder: Path) -> None:
    text = complaint(folder, GOOD + "correct: {limit: auto}")
    assert "tasks.sql.validation: is missing" in text
    assert "tasks.support.validation: is missing" in text
    with_data = GOOD.replace("{train: sql.jsonl,", "{train: sql.jsonl, validation: mix.jsonl,")
    manifest = load(folder, with_data + "correct: {limit: auto}")
    assert manifest.correct.limit == "auto"
    assert manifest.tasks["sql"].validation == (str(folder / "mix.jsonl"),)
    assert "correct.limit: write a number" in complaint(folder, GOOD + "correct: {limit: most}")


def test_the_choice_of_a_limit_reads_the_held_out_data(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{}")
    with_data = GOOD.replace("{train: sql.jsonl,", "{train: sql.jsonl, validation: mix.jsonl,")
    manifest = load(folder, with_data + "correct: {limit: auto}")
    step = next(step for step in steps_of(manifest, ["support"]) if step.kind == "correct")
    assert step.fields == {"limit": "auto", "max_length": 64}
    assert step.sources["validation data"].text == str(folder / "mix.jsonl")
    by_default = next(step for step in steps_of(load(folder, with_data), ["support"]) if step.kind == "correct")
    assert (by_default.fields, by_default.sources) == (step.fields, step.sources)
    plain_text = GOOD.replace("train: {lora", "train: {anchor: none, lora")
    plain = next(step for step in steps_of(load(folder, plain_text), ["support"]) if step.kind == "correct")
    assert (plain.fields, set(plain.sources)) == ({"limit": 3.0}, {"model"})


def test_limit_none_is_no_limit_and_a_task_may_be_called_no(folder: Path) -> None:
    manifest = load(folder, GOOD.replace("  sql:", "  no:") + "correct: {limit: none}")
    assert manifest.correct.limit is None
    assert list(manifest.tasks) == ["no", "support"]


def test_hub_ids_pass_but_a_near_miss_of_a_path_does_not(folder: Path) -> None:
    manifest = load(folder, GOOD.replace("path: model", "path: org/model").replace("data: mix.jsonl", "data: org/set"))
    assert (manifest.model.path, emulator_of(manifest).calibration.data) == ("org/model", ("org/set",))
    assert "no such file" in complaint(folder, GOOD.replace("data: mix.jsonl", "data: org/set.jsonl"))


def test_an_unknown_task_is_named_with_the_nearest(folder: Path) -> None:
    manifest = load(folder, GOOD)
    assert check_tasks(manifest, ["support"]) == ["support"]
    with pytest.raises(InputError, match=r"tasks\.suport: unknown task, nearest is `support`"):
        check_tasks(manifest, ["suport"])


def test_the_schema_names_every_field(folder: Path) -> None:
    schema = manifest_schema()
    assert set(schema["properties"]) == set(Manifest.model_fields)
    assert "learning_rate" in schema["$defs"]["TrainerArgs"]["properties"]


def test_the_documented_example_loads(folder: Path) -> None:
    guide = (ROOT / "manifests" / "README.md").read_text()
    text = guide.split("```yaml\n")[1].split("```")[0]
    document: dict[str, Any] = yaml.safe_load(text)
    (folder / "data").mkdir()
    for task in document["tasks"].values():
        for name in (task["train"], task.get("test", task["train"])):
            (folder / name).write_text('{"text": "a"}\n')
    for name in document["emulator"]["calibration"]["data"]:
        (folder / name).write_text('{"text": "a"}\n')
    assert set(document) == set(Manifest.model_fields) - {"images", "samples"}, "of texts"
    assert list(load(folder, text).tasks) == list(document["tasks"])


def test_loading_a_manifest_imports_no_torch(folder: Path) -> None:
    (folder / "m.yaml").write_text(GOOD)
    code = (
        "import sys; from onelayer.runtime.manifest.manifest import *; "
        f"load_manifest({str(folder / 'm.yaml')!r}); print({{'torch', 'transformers', 'trl'}} & set(sys.modules))"
    )
    paths = [str(ROOT / name) for name in ("compiler", "runtime")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "set()"


def test_anchors_are_every_so_many_steps_or_none(folder: Path) -> None:
    anchored = GOOD.replace("train: {lora", "train: {anchor: {every: 10}, lora")
    found = load(folder, anchored).training("sql").anchor
    assert found is not None
    assert (found.every, found.bits) == (10, 2)
    assert load(folder, anchored.replace("{every: 10}", "none")).training("sql").anchor is None
    assert "train.anchor.bits" in complaint(folder, anchored.replace("every: 10", "every: 10, bits: 3"))
    assert "train.anchor.every" in complaint(folder, anchored.replace("every: 10", "every: 0"))
    lone = anchored.replace("emulator: {calibration: {data: mix.jsonl}}", "")
    assert "train.anchor: there is no emulator" in complaint(folder, lone)


def test_a_task_has_its_own_anchors(folder: Path) -> None:
    def anchors(train: str, task: str) -> tuple[Anchor | None, Anchor | None]:
        text = GOOD.replace("train: {lora", f"train: {{{train}lora").replace("lora: {r: 4}", f"lora: {{r: 4}}{task}")
        loaded = load(folder, text)
        return loaded.training("sql").anchor, loaded.training("support").anchor

    assert anchors("anchor: {}, ", "") == (Anchor(every=10, bits=2), Anchor(every=10, bits=2))
    assert anchors("anchor: {every: 5}, ", ", anchor: {bits: 4}") == (Anchor(every=5), Anchor(every=5, bits=4))
    assert anchors("anchor: {every: 5}, ", ", anchor: none") == (Anchor(every=5), None)
    assert anchors("anchor: none, ", ", anchor: {}") == (None, Anchor(every=10))
    assert anchors("anchor:, ", ", anchor:") == (Anchor(every=10), Anchor(every=10))
    lone = GOOD.replace("emulator: {calibration: {data: mix.jsonl}}", "").replace("{r: 4}", "{r: 4}, anchor: {}")
    assert "tasks.support.anchor: there is no emulator" in complaint(folder, lone)


@pytest.mark.parametrize(
    ("text", "anchored", "refined", "limits"),
    [
        (GOOD, (True, True), False, ("auto", 0.0)),
        (GOOD.replace("lora: {r: 4}", "lora: {r: 4}, anchor: none"), (True, False), True, ("auto", 3.0)),
        (GOOD.replace("train: {lora", "train: {anchor: none, lora"), (False, False), True, ("auto", 3.0)),
        (GOOD.replace("mix.jsonl}}", "mix.jsonl}, refine: {}}"), (True, True), True, ("auto", 0.0)),
        (GOOD.replace("mix.jsonl}}", "mix.jsonl}, ratio: 0.25}"), (False, False), False, ("auto", 3.0)),
        (GOOD.replace("train: {lora", "train: {method: dpo, lora"), (False, False), True, (3.0, 3.0)),
        (GOOD.replace("train: {lora", "train: {method: kto, anchor: {}, lora"), (True, True), False, (0.0, 0.0)),
    ],
)
def test_what_is_left_open_follows_the_measurements(
    folder: Path, text: str, anchored: tuple[bool, bool], refined: bool, limits: tuple[Any, Any]
) -> None:
    manifest = load(folder, text.replace("test: sql.jsonl}", "validation: sql.jsonl}"))
    assert tuple(manifest.training(name).anchor is not None for name in manifest.tasks) == anchored
    assert (emulator_of(manifest).refine is not None) == refined
    assert tuple(manifest.limit(name) for name in manifest.tasks) == limits
