"""Arguments of the trainers in a manifest: names, and what scores, reports and preferences need."""

import dataclasses
from pathlib import Path

import pytest

from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import Manifest, load_manifest
from onelayer.runtime.training.trainer_args import (
    CONFIG_NAMES,
    METHODS,
    NON_SEMANTIC_ARGS,
    REFUSED_PREFERENCE_ARGS,
    Method,
    refused_args,
    trainer_args_model,
)

GOOD = """
version: 1
model: {path: model}
emulator: {calibration: {data: mix.jsonl}}
train: {lora: {r: 8, alpha: 16}, args: {learning_rate: 1e-4, max_steps: 500}}
tasks:
  sql: {train: sql.jsonl, test: sql.jsonl}
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


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, text)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_argument_names_are_those_of_the_trainer(method: Method) -> None:
    trl = pytest.importorskip("trl")
    model = trainer_args_model(method)
    assert model is not None
    real = {field.name for field in dataclasses.fields(getattr(trl, CONFIG_NAMES[method])) if field.init}
    assert set(model.model_fields) == real
    assert not NON_SEMANTIC_ARGS & set(refused_args(method))
    if method == "sft":
        assert real >= NON_SEMANTIC_ARGS


def test_every_refused_argument_of_preferences_exists() -> None:
    models = [trainer_args_model(method) for method in ("dpo", "kto")]
    known = {name for model in models if model is not None for name in model.model_fields}
    assert known >= REFUSED_PREFERENCE_ARGS.keys()


def test_preferences_take_the_arguments_of_their_trainer(folder: Path) -> None:
    learned = GOOD.replace("train: {lora: {r: 8, alpha: 16},", "train: {method: dpo, lora: {r: 8, alpha: 16},")
    assert load(folder, learned.replace("max_steps: 500", "beta: 2e-1")).training("sql").args["beta"] == 0.2
    assert "train.args.beta: unknown field" in complaint(folder, GOOD.replace("max_steps: 500", "beta: 2e-1"))
    refused = complaint(folder, learned.replace("max_steps: 500", "packing: true, sync_ref_model: true"))
    assert "train.args.packing: unknown field" in refused
    assert "train.args.sync_ref_model: cannot be set here" in refused
    polished = learned.replace("test: sql.jsonl", "test: sql.jsonl, validation: sql.jsonl, polish: {}")
    assert "tasks.sql.polish: exact steps learn answers" in complaint(folder, polished)
    assert load(folder, learned.replace("test: sql.jsonl", "validation: sql.jsonl")).limit("sql") == 3.0
    assert "correct.limit: auto chooses by the loss" in complaint(folder, learned + "correct: {limit: auto}\n")
    assert "train.method: input should be" in complaint(folder, learned.replace("method: dpo", "method: ppo"))


def test_scores_and_reports_are_checked_before_work(folder: Path) -> None:
    scored = GOOD.replace("max_steps: 500", "max_steps: 500, eval_steps: 10")
    told = "tasks.sql.validation: is missing, `eval_steps` scores held-out data while training"
    assert told in complaint(folder, scored)
    load(
        folder,
        scored.replace("test: sql.jsonl", "validation: sql.jsonl").replace("merge", "validation: sql.jsonl, merge"),
    )
    reported = GOOD.replace("max_steps: 500", "max_steps: 500, report_to: [swanlab]")
    assert "train.args.report_to: swanlab: needs a package that is not installed" in complaint(folder, reported)
