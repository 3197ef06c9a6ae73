"""Exact steps compared with those of the resident model; held-out choice, settings, and the written file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.peft_adapters import load_adapter, load_original, random_adapter
from helpers.polish_runs import WORDS, polished, prepare, products, resident_steps, same, weights
from onelayer.compiler import correct_adapter, evaluate_model
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.data.train_rows import TrainRows
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.settings import PolishSettings


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_the_steps_are_those_of_the_resident_model(setup: Path) -> None:
    expected = resident_steps(setup)
    result = polished(setup)
    found = products(load_adapter(load_original(setup / "model"), setup / "out"))
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-6)
    assert [step.loss for step in result.steps] == sorted((step.loss for step in result.steps), reverse=True)
    assert result.report.bytes_read > 0
    assert result.chosen_step == 3


def test_the_same_seed_gives_the_same_adapter_and_another_another(setup: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        polished(setup, output=setup / name, seed=seed)
    assert same(setup / "one", setup / "two")
    assert not same(setup / "one", setup / "other")


def test_micro_batches_do_not_change_the_gradient(setup: Path) -> None:
    rows = [{"text": " ".join(WORDS[i : i + 6])} for i in range(6)]
    (setup / "even.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for size in (1, 5):
        polished(setup, data=setup / "even.jsonl", output=setup / str(size), micro_batch_size=size)
    for name, tensor in weights(setup / "1").items():
        torch.testing.assert_close(weights(setup / "5")[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_given_adapter_is_unchanged_and_the_result_fits_the_original(setup: Path) -> None:
    before = (setup / "adapter" / "adapter_model.safetensors").read_bytes()
    polished(setup)
    assert (setup / "adapter" / "adapter_model.safetensors").read_bytes() == before
    found = Adapter.open(setup / "out")
    assert found.config.r == found.config.lora_alpha == 3
    assert found.provenance is not None
    assert found.provenance["polished"] is True
    assert len(found.provenance["steps"]) == 3
    assert found.config.base_model_name_or_path == str(setup / "model")


def test_a_fresh_adapter_learns(setup: Path) -> None:
    result = polished(setup, adapter=None, lora_rank=4, steps=6)
    assert result.steps[-1].loss < result.steps[0].loss
    assert result.trainable_parameters == sum(tensor.numel() for tensor in weights(setup / "out").values())
    start, trained = evaluate_model(setup / "model", setup / "train.jsonl", adapters=[setup / "out"]).results
    assert trained.loss < start.loss


@pytest.mark.parametrize(("name", "of_an_expert"), [("mixtral", "w2"), ("qwen3_moe", "down_proj")])
def test_a_fresh_adapter_of_a_mixture_leaves_its_experts_alone(name: str, of_an_expert: str, tmp_path: Path) -> None:
    prepare(tmp_path, name, ["q_proj"])
    result = polished(tmp_path, adapter=None, lora_rank=4)
    assert result.steps[-1].loss < result.steps[0].loss
    model: Any = load_original(tmp_path / "model")
    linears = {part for part, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(Adapter.open(tmp_path / "out").modules) == {f"model.{part}" for part in linears}
    with pytest.raises(InputError, match="are experts or routers of a mixture"):
        polished(tmp_path, adapter=None, lora_rank=4, target_modules=["q_proj", of_an_expert], output=tmp_path / "no")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"adapter": None}, "either an adapter, or --lora-rank"),
        ({"lora_rank": 4}, "--lora-rank: is for a fresh adapter"),
        ({"lora_alpha": 4}, "--lora-alpha: is for a fresh adapter"),
        ({"target_modules": "all-linear"}, "--target-modules: is for a fresh adapter"),
        ({"adapter": None, "lora_rank": 0}, "--lora-rank 0: must be at least 1"),
        ({"adapter": None, "lora_rank": 2, "lora_alpha": 0.0}, "--lora-alpha 0.0: must be a number greater than 0"),
        ({"adapter": None, "lora_rank": 2, "lora_alpha": -1.0}, "--lora-alpha -1.0: must be"),
        ({"adapter": None, "lora_rank": 2, "lora_alpha": float("nan")}, "--lora-alpha nan: must be"),
        ({"adapter": None, "lora_rank": 2, "lora_alpha": float("inf")}, "--lora-alpha inf: must be"),
        ({"adapter": None, "lora_rank": 2, "target_modules": "["}, r"--target-modules \[: no regular expression"),
    ],
)
def test_either_an_adapter_or_a_fresh_one(setup: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        polished(setup, **fields)


def test_without_a_limit_gradients_are_as_with_one_that_none_reaches(setup: Path) -> None:
    polished(setup, output=setup / "large", steps=2, max_gradient_norm=1e9)
    polished(setup, output=setup / "none", steps=2, max_gradient_norm=float("inf"))
    assert same(setup / "large", setup / "none")


def test_the_best_adapter_on_held_out_data_is_handed_out(setup: Path) -> None:
    # Steps this large overshoot, so the first or the start is best.
    result = polished(setup, eval_data=setup / "dev.jsonl", learning_rate=0.5, steps=3)
    losses = [item.loss for item in result.held_out]
    assert [item.step for item in result.held_out] == [0, 1, 2, 3]
    assert losses[-1] > min(losses)
    assert result.chosen_step == losses.index(min(losses))
    _, scored = evaluate_model(setup / "model", setup / "dev.jsonl", adapters=[setup / "out"]).results
    assert scored.loss == pytest.approx(min(losses), abs=1e-5)


def test_a_held_out_loss_that_is_lost_stops_the_steps(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onelayer.compiler.streaming.token_loss.TokenLoss.held_out_loss", float("nan"))
    with pytest.raises(RuntimeError, match="the held-out loss is not finite"):
        polished(setup, eval_data=setup / "dev.jsonl", steps=1)


def test_held_out_losses_cost_no_step_anything(setup: Path) -> None:
    polished(setup, output=setup / "plain")
    result = polished(setup, output=setup / "watched", eval_data=setup / "train.jsonl", eval_steps=2)
    assert [item.step for item in result.held_out] == [0, 2, 3]
    assert result.chosen_step == 3
    assert same(setup / "plain", setup / "watched")


def test_an_adapter_of_another_model_is_refused_by_digest(setup: Path) -> None:
    (setup / "adapter" / "onelayer.json").write_text(
        json.dumps({"kind": "adapter", "corrected": True, "base": {"digest": "0" * 64}})
    )
    with pytest.raises(InputError, match="another original"):
        polished(setup)


def test_a_polished_adapter_needs_no_correction(setup: Path) -> None:
    from helpers.reference_emulators import write_emulator

    polished(setup)
    write_emulator(load_original(setup / "model"), setup / "model", setup / "emulator")
    with pytest.raises(InputError, match="already corrected"):
        correct_adapter(setup / "out", emulator=setup / "emulator", model=setup / "model", output=setup / "corrected")


def test_rank_and_alpha_patterns_keep_their_meaning(setup: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    random_adapter(load_original(setup / "model"), setup / "odd", size=0.05, target_modules="all-linear", **fields)
    polished(setup, adapter=setup / "odd", learning_rate=1e-12)
    before = products(load_adapter(load_original(setup / "model"), setup / "odd"))
    after = products(load_adapter(load_original(setup / "model"), setup / "out"))
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"warmup_steps": 3},
        {"learning_rate": float("nan")},
        {"activations": 1.5},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setup: Path, fields: dict[str, Any]) -> None:
    name = next(iter(fields)).replace("_", "-")
    with pytest.raises(InputError, match=f"--{name}"):
        polished(setup, **fields)


def test_a_batch_takes_no_row_twice_and_says_so(setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = TrainRows.read(setup / "train.jsonl", load_tokenizer(setup / "model"), 64, 100_000, 0)
    assert sorted(row.input_ids for row in rows.batch(0)) == sorted(row.input_ids for row in rows.rows)
    told = "onelayer: note: --batch-size 100000: there are 9 examples, a step takes each of them once\n"
    assert capsys.readouterr().err == told


def test_a_row_of_one_token_is_told_what_would_help(setup: Path) -> None:
    (setup / "short.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match="two tokens or more"):
        polished(setup, data=setup / "train.jsonl", eval_data=setup / "short.jsonl")


def test_every_row_is_taken_once_in_a_round(setup: Path) -> None:
    rows = TrainRows.read(setup / "train.jsonl", load_tokenizer(setup / "model"), 64, 3, 0)
    first = [tuple(row.input_ids) for step in range(3) for row in rows.batch(step)]
    second = [tuple(row.input_ids) for step in range(3, 6) for row in rows.batch(step)]
    assert sorted(first) == sorted(second) == sorted(tuple(row.input_ids) for row in rows.rows)
    assert first != second


def test_the_rate_rises_then_falls_to_zero_behind_the_last_step() -> None:
    settings = PolishSettings(steps=6, batch_size=1, learning_rate=1.0, warmup_steps=2, max_length=8)
    rates = [settings.learning_rate_at(step) for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_compressed_inputs_say_what_they_cost(setup: Path) -> None:
    exact = polished(setup, output=setup / "exact")
    result = polished(setup, activations=0.2, micro_batch_size=5)
    assert exact.gradient_cosine is None
    assert result.gradient_cosine is not None
    assert 0.3 < result.gradient_cosine < 1
    assert result.kept_bytes <= exact.kept_bytes
    assert result.steps[-1].loss < result.steps[0].loss
