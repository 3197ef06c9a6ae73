"""Labeled rows and sequence classifiers: compile, evaluate and exact steps compared with the resident model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.classifiers import FAMILIES, TEXTS, row_losses, save_classifier, write_labeled
from helpers.peft_adapters import load_adapter, random_adapter
from helpers.tiny_models import save_tiny
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, merge_adapter, polish_adapter
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.data.train_rows import TrainRows
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.settings import PolishSettings
from onelayer.runtime import load_emulator, train_lora
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore

TARGETS = {"bert": ["query", "value", "dense"], "llama": ["q_proj", "down_proj"]}
HEAD = {"bert": "classifier", "llama": "score"}
MANIFEST = """
version: 1
model: {path: model}
emulator: {ratio: 0.5, calibration: {data: data.jsonl}}
train: {args: {max_steps: 4, per_device_train_batch_size: 3, learning_rate: 1.0e-2}}
polish: {steps: 2, batch_size: 7}
tasks:
  topics: {train: data.jsonl, validation: data.jsonl, test: data.jsonl}
"""


def resident(model: Any, directory: Path, adapter: Path | None = None) -> Any:
    """Load the model with transformers and PEFT."""
    loaded = type(model).from_pretrained(directory).eval()
    return loaded if adapter is None else load_adapter(loaded, adapter)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_the_resident_models_with_and_without_a_trained_head(
    family: str, batch_size: int, tmp_path: Path
) -> None:
    directory, data = tmp_path / "model", write_labeled(tmp_path / "data.jsonl")
    model = save_classifier(family, directory)
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    random_adapter(resident(model, directory), plain, task_type=None, target_modules=TARGETS[family])
    random_adapter(resident(model, directory), whole, seed=2, task_type="SEQ_CLS", target_modules=TARGETS[family])
    assert HEAD[family] in json.loads((whole / "adapter_config.json").read_text())["modules_to_save"]
    result = evaluate_model(directory, data, adapters=[whole, plain], batch_size=batch_size)
    found = set()
    for score, adapter in zip(result.results, (None, whole, plain), strict=True):
        losses, accuracy = row_losses(resident(model, directory, adapter), directory)
        assert score.loss == pytest.approx(losses.mean().item(), rel=1e-5)
        assert score.token_accuracy == pytest.approx(accuracy)
        assert (score.tokens, score.questions) == (len(TEXTS), 0)
        found.add(round(score.loss, 6))
    assert len(found) == 3, "adapters that change nothing prove nothing"


def test_the_original_keeps_its_norm_when_an_adapter_replaces_it(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the quick brown fox"}))
    random_adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm"])
    alone = evaluate_model(tmp_path / "model", tmp_path / "data.jsonl").results[0]
    both = evaluate_model(tmp_path / "model", tmp_path / "data.jsonl", adapters=[tmp_path / "a"]).results
    assert both[0].loss == alone.loss != both[1].loss


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_of_a_classifier_is_compiled_from_labeled_rows(family: str, tmp_path: Path) -> None:
    directory, data = tmp_path / "model", write_labeled(tmp_path / "data.jsonl")
    save_classifier(family, directory)
    compiled = compile_emulator(directory, data, tmp_path / "emulator", ratio=0.5)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in TEXTS))
    again = compile_emulator(directory, texts, tmp_path / "again", ratio=0.5)
    assert [linear.error for linear in compiled.linears] == [linear.error for linear in again.linears]
    against = evaluate_model(directory, data, against=tmp_path / "emulator", batch_size=2).against
    assert against is not None
    losses, accuracy = row_losses(load_emulator(tmp_path / "emulator").eval(), directory)
    assert against.loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert against.token_accuracy == pytest.approx(accuracy)


def resident_steps(model: Any, setup: Path, steps: int, rate: float) -> tuple[dict[str, torch.Tensor], float]:
    """Run the same steps with PEFT, torch and the whole model in memory; return A, B and the first gradient's norm."""
    directory = setup / "model"
    base = model.get_base_model()
    classes = predicted_classes(type(base), base.config, directory)
    rows = TrainRows.read(setup / "data.jsonl", load_tokenizer(directory), 64, 5, 0, classes)
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(trained.values()), weight_decay=0.0)
    settings = PolishSettings(steps=steps, batch_size=5, micro_batch_size=2, learning_rate=rate, max_length=64)
    norms = []
    model.train()
    for step in range(steps):
        for tokens in rows.batch(step):
            ids, label = torch.tensor([tokens.input_ids]), torch.tensor([tokens.label])
            (F.cross_entropy(model(input_ids=ids).logits, label) / 5).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}, norms[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_exact_steps_are_those_of_the_resident_model(family: str, task_type: str | None, tmp_path: Path) -> None:
    directory, adapter = tmp_path / "model", tmp_path / "adapter"
    data = write_labeled(tmp_path / "data.jsonl")
    model = save_classifier(family, directory)
    options: dict[str, Any] = {"size": 0.05, "lora_alpha": 8, "task_type": task_type}
    random_adapter(resident(model, directory), adapter, target_modules=TARGETS[family], **options)
    expected, norm = resident_steps(resident(model, directory, adapter), tmp_path, 2, 1e-2)
    result = polish_adapter(
        adapter, model=directory, data=data, output=tmp_path / "out", steps=2, batch_size=5, micro_batch_size=2,
        learning_rate=1e-2, max_length=64, eval_data=data,
    )  # fmt: skip
    out = resident(model, directory, tmp_path / "out")
    found = dict(out.named_parameters())
    for name, tensor in expected.items():
        # Adam divides by the gradient's size, so the smallest entries move by an amount that rounding decides.
        torch.testing.assert_close(found[name].detach(), tensor, rtol=1e-4, atol=5e-5)
    assert result.steps[0].gradient_norm == pytest.approx(norm, rel=1e-4)
    before, _ = row_losses(resident(model, directory, adapter), directory)
    after, _ = row_losses(out, directory)
    assert result.held_out[0].loss == pytest.approx(before.mean().item(), rel=1e-5)
    assert result.held_out[-1].loss == pytest.approx(after.mean().item(), rel=1e-4)
    assert result.steps[0].tokens == 5


def test_a_fresh_adapter_of_a_classifier_leaves_out_the_head(tmp_path: Path) -> None:
    model = save_classifier("bert", tmp_path / "model")
    data = write_labeled(tmp_path / "data.jsonl")
    polish_adapter(
        None, model=tmp_path / "model", data=data, output=tmp_path / "out", steps=2, batch_size=7, lora_rank=2,
        learning_rate=1e-2,
    )  # fmt: skip
    before, _ = row_losses(model, tmp_path / "model")
    after, _ = row_losses(resident(model, tmp_path / "model", tmp_path / "out"), tmp_path / "model")
    assert after.mean().item() < before.mean().item()
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert not any("classifier" in name for name in targets)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 3}], r":1: field 'label' is 3; write a number from 0 .*: city, color, number"),
        ([{"text": "a", "label": -1}], r":1: field 'label' is -1"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": "sea"}], r":2: field 'label' is 'sea'"),
        ([{"text": "a", "label": 0}, {"text": "a"}], r":2: has no 'label' and .*:1 has one; keep them apart"),
        ([{"text": "a"}, {"text": "a", "label": 0}], r":2: has a 'label' and .*:1 has none; keep them apart"),
        ([{"text": "a", "label": 1.5}], r":1: field 'label' must be a whole number or a name"),
        ([{"text": "a", "label": True}], r":1: field 'label' must be a whole number or a name"),
        ([{"text": "a"}], r":1: has no 'label', and the model is a classifier of 3 classes"),
        ([{"prompt": "a", "completion": "b"}], r":1: has no 'label', and the model is a classifier of 3 classes"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    save_classifier("bert", tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message) as fault:
        evaluate_model(tmp_path / "model", data)
    assert "\n" not in str(fault.value)
    with pytest.raises(InputError, match=message):
        polish_adapter(None, model=tmp_path / "model", data=data, output=tmp_path / "out", lora_rank=2)


def test_labels_are_refused_by_a_model_that_predicts_tokens(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    data = write_labeled(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=r":1: field 'label' needs a sequence classifier"):
        evaluate_model(tmp_path / "model", data)
    with pytest.raises(InputError, match=r":1: field 'label' needs a sequence classifier"):
        polish_adapter(None, model=tmp_path / "model", data=data, output=tmp_path / "out", lora_rank=2)


def test_classifiers_of_another_kind_are_refused(tmp_path: Path) -> None:
    data = write_labeled(tmp_path / "data.jsonl")
    save_classifier("bert", tmp_path / "several", problem_type="multi_label_classification")
    with pytest.raises(InputError, match=r"config\.json: field problem_type: multi_label_classification"):
        evaluate_model(tmp_path / "several", data)
    save_classifier("llama", tmp_path / "endless", pad_token_id=None)
    evaluate_model(tmp_path / "endless", data)
    with pytest.raises(InputError, match=r"pad_token_id is not set"):
        evaluate_model(tmp_path / "endless", data, batch_size=2)


def test_a_checkpoint_without_the_head_is_refused_by_name(tmp_path: Path) -> None:
    model = save_classifier("bert", tmp_path / "model")
    model.bert.save_pretrained(tmp_path / "headless")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "headless" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    with pytest.raises(InputError, match=r"classifier\.weight"):
        evaluate_model(tmp_path / "headless", write_labeled(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains_head", [True, False])
def test_the_whole_loop(family: str, trains_head: bool, tmp_path: Path) -> None:
    directory, data = tmp_path / "model", write_labeled(tmp_path / "data.jsonl")
    model = save_classifier(family, directory)
    compile_emulator(directory, data, tmp_path / "emulator", ratio=0.5)
    lora: dict[str, Any] | None = None if trains_head else {"modules_to_save": []}
    trained = train_lora(
        tmp_path / "emulator", data, tmp_path / "adapter", max_steps=12, batch_size=3, learning_rate=2e-2, lora=lora
    )
    assert trained.losses[-1][1] < trained.losses[0][1]
    source = Adapter.open(tmp_path / "adapter")
    assert (f"{HEAD[family]}.weight" in source.dense) is trains_head
    assert not any(HEAD[family] in name for name in source.modules)
    auto: dict[str, Any] = {"limit": "auto", "data": data, "batch_size": 2}
    for name, how in (("limit3", {"limit": 3.0}), ("auto", auto)):
        correct_adapter(
            tmp_path / "adapter", emulator=tmp_path / "emulator", model=directory, output=tmp_path / name, **how
        )
    polish_adapter(tmp_path / "auto", model=directory, data=data, output=tmp_path / "polished", steps=2, batch_size=7)
    for name in ("limit3", "auto", "polished"):
        carried = Adapter.open(tmp_path / name)
        assert carried.dense.keys() == source.dense.keys()
        for parameter, key in source.dense.items():
            assert torch.equal(carried.read(carried.dense[parameter]), source.read(key))
    names = ["adapter", "limit3", "auto", "polished"]
    scores = evaluate_model(directory, data, adapters=[tmp_path / name for name in names], batch_size=2).results
    for score, name in zip(scores[1:], names, strict=True):
        losses, accuracy = row_losses(resident(model, directory, tmp_path / name), directory)
        assert score.loss == pytest.approx(losses.mean().item(), rel=1e-4)
        assert score.token_accuracy == pytest.approx(accuracy)
    assert scores[4].loss < scores[3].loss < scores[0].loss
    merge_adapter(tmp_path / "polished", model=directory, output=tmp_path / "merged")
    merged = evaluate_model(tmp_path / "merged", data).results[0]
    assert merged.loss == pytest.approx(scores[4].loss, rel=1e-4)
    losses, _ = row_losses(resident(model, tmp_path / "merged"), directory)
    assert losses.mean().item() == pytest.approx(merged.loss, rel=1e-4)


def test_a_manifest_runs_a_classifier(tmp_path: Path) -> None:
    save_classifier("bert", tmp_path / "model")
    write_labeled(tmp_path / "data.jsonl")
    (tmp_path / "m.yaml").write_text(MANIFEST)
    manifest, store = load_manifest(tmp_path / "m.yaml"), ArtifactStore(tmp_path / "home")
    result = run(manifest, store)
    assert not result.failed
    losses = {row["name"]: row["loss"] for row in result.evaluations["topics"]}
    assert losses["polished"] < losses["original"]
    assert run(manifest, store).evaluations == result.evaluations


def test_parts_of_a_step_weigh_by_their_rows(tmp_path: Path) -> None:
    save_classifier("bert", tmp_path / "model")
    data = write_labeled(tmp_path / "data.jsonl", TEXTS[:6])
    options: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "args": {"max_grad_norm": 1e9}}
    whole = train_lora(tmp_path / "model", data, tmp_path / "whole", batch_size=6, **options)
    parts = train_lora(tmp_path / "model", data, tmp_path / "parts", batch_size=2, gradient_accumulation=3, **options)
    for (_, first), (_, second) in zip(whole.losses, parts.losses, strict=True):
        assert first == pytest.approx(second, rel=1e-3)
    a, b = (Adapter.open(tmp_path / name) for name in ("whole", "parts"))
    for key in a.tensors:
        torch.testing.assert_close(a.read(key), b.read(key), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"args": {"packing": True}}, r"args\.packing: applies to models that predict the next token"),
        ({"pad_token_id": 3}, {}, r"pad_token_id is 3 in config\.json and 0 in the tokenizer"),
        ({"num_labels": 2}, {}, r"field 'label' is 'color'; write a number from 0 to 1"),
    ],
)
def test_training_on_impossible_inputs_is_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_classifier("llama", tmp_path / "model", **changes)
    data = write_labeled(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=message):
        train_lora(tmp_path / "model", data, tmp_path / "out", max_steps=1, **options)
    assert not (tmp_path / "out").exists()
