"""Exact steps against those of the resident model; resume, held-out choice, faults, and the file that leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import load_adapter, load_original, random_adapter
from onelayer.compiler import correct_adapter, evaluate_model, polish_adapter
from onelayer.compiler.adapter import Adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.examples import load_tokenizer
from onelayer.compiler.files import read_json
from onelayer.compiler.polish import PolishResult
from onelayer.compiler.polish_data import TrainRows
from onelayer.compiler.polish_job import Settings
from onelayer.compiler.polish_state import PolishState
from tiny import CORPUS, save_tiny

WORDS = CORPUS[0].split()


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    rows = [
        {"prompt": " ".join(WORDS[i : i + 4]), "completion": " " + " ".join(WORDS[i + 4 : i + 9])} for i in range(9)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"text": " ".join(reversed(WORDS))}))
    random_adapter(load_original(tmp_path / "model"), tmp_path / "adapter", size=0.05, r=3, target_modules="all-linear")
    return tmp_path


def polished(setup: Path, **fields: Any) -> PolishResult:
    arguments = {"steps": 3, "batch_size": 5, "learning_rate": 1e-2, "max_length": 64, **fields}
    adapter = arguments.pop("adapter", setup / "adapter")
    output = arguments.pop("output", setup / "out")
    data = arguments.pop("data", setup / "train.jsonl")
    return polish_adapter(adapter, model=setup / "model", data=data, output=output, **arguments)


def resident_steps(setup: Path, steps: int = 3, learning_rate: float = 1e-2) -> dict[str, torch.Tensor]:
    """The same steps with PEFT, torch and the whole model in memory; B A of every module."""
    model = load_adapter(load_original(setup / "model"), setup / "adapter").train()
    settings = Settings(steps, 5, 1, learning_rate, 0, 1.0, 64, 1, None, 0)
    rows = TrainRows.read(setup / "train.jsonl", load_tokenizer(setup / "model"), 64, 5, 0)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(steps):
        batch = rows.batch(step)
        for tokens in batch:
            ids, labels = torch.tensor([tokens.input_ids]), torch.tensor([tokens.labels])
            total = sum(row.labelled for row in batch)
            model(input_ids=ids, labels=labels, num_items_in_batch=total).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return products(model)


def products(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


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


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    """Whether two adapters are equal bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_nothing_of_the_adapter_given_is_changed_and_the_result_is_of_the_original(setup: Path) -> None:
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


@pytest.mark.parametrize("fields", [{"adapter": None}, {"lora_rank": 4}])
def test_either_an_adapter_or_a_rank(setup: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="either an adapter, or --lora-rank"):
        polished(setup, **fields)


def test_the_best_adapter_on_held_out_data_is_handed_out(setup: Path) -> None:
    # Steps this large overshoot, so the first or the start is best.
    result = polished(setup, eval_data=setup / "dev.jsonl", learning_rate=0.5, steps=3)
    losses = [item.loss for item in result.held_out]
    assert [item.step for item in result.held_out] == [0, 1, 2, 3]
    assert losses[-1] > min(losses)
    assert result.chosen_step == losses.index(min(losses))
    _, scored = evaluate_model(setup / "model", setup / "dev.jsonl", adapters=[setup / "out"]).results
    assert scored.loss == pytest.approx(min(losses), abs=1e-5)


def test_held_out_losses_cost_no_step_anything(setup: Path) -> None:
    polished(setup, output=setup / "plain")
    result = polished(setup, output=setup / "watched", eval_data=setup / "train.jsonl", eval_steps=2)
    assert [item.step for item in result.held_out] == [0, 2, 3]
    assert result.chosen_step == 3
    assert same(setup / "plain", setup / "watched")


def test_a_stopped_run_goes_on_where_it_was(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = polished(setup, output=setup / "whole", steps=4, eval_data=setup / "dev.jsonl")
    real = PolishState.save

    def stopping(self: PolishState, directory: Path) -> None:
        real(self, directory)
        if len(self.steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PolishState, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        polished(setup, steps=4, eval_data=setup / "dev.jsonl")
    monkeypatch.setattr(PolishState, "save", real)
    assert not (setup / "out").exists()
    with pytest.raises(InputError, match="learning_rate"):
        polished(setup, steps=4, eval_data=setup / "dev.jsonl", learning_rate=0.1)
    result = polished(setup, steps=4, eval_data=setup / "dev.jsonl")
    assert same(setup / "whole", setup / "out")
    assert [step.loss for step in result.steps] == [step.loss for step in expected.steps]
    assert result.held_out == expected.held_out
    assert not (setup / ".out.polish").exists()


KILLED = """
import sys
import torch
from onelayer.compiler import polish_adapter
torch.set_num_threads(1)  # as these tests do: sums over several threads come out otherwise
polish_adapter(sys.argv[1] + "/adapter", model=sys.argv[1] + "/model", data=sys.argv[1] + "/train.jsonl",
    output=sys.argv[1] + "/out", steps=14, batch_size=5, learning_rate=1e-2, max_length=64)
"""


def test_a_kill_loses_the_step_in_progress_and_no_more(setup: Path) -> None:
    whole = polished(setup, output=setup / "whole", steps=14)
    state = setup / ".out.polish" / "state.safetensors"
    for finished in (1, 5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(setup)], env={**os.environ})
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and steps_in(state) < finished:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert steps_in(state) >= finished
    result = polished(setup, steps=14)
    assert same(setup / "whole", setup / "out")
    assert [step.loss for step in result.steps] == [step.loss for step in whole.steps]


def steps_in(state: Path) -> int:
    from safetensors import safe_open

    if not state.is_file():
        return 0
    with safe_open(state, framework="pt") as file:
        return len(json.loads(file.metadata()["history"])["steps"])


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_what_was_good(setup: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step 2: the loss is not finite.*holds the adapter of the 1 steps"):
        polished(setup, learning_rate=1e30, max_gradient_norm=1e30)
    assert all(tensor.isfinite().all() for tensor in weights(setup / "out").values())
    record = read_json(setup / "out" / "onelayer.json")
    assert len(record["steps"]) == 1
    assert "not finite" in record["stopped"]


def test_a_loss_that_is_never_finite_leaves_nothing(setup: Path) -> None:
    file = setup / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))].fill_(1e38)
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match="step 1: the loss is not finite"):
        polished(setup)
    assert not (setup / "out").exists()


def test_an_adapter_of_another_model_is_refused_by_digest(setup: Path) -> None:
    (setup / "adapter" / "onelayer.json").write_text(
        json.dumps({"kind": "adapter", "corrected": True, "base": {"digest": "0" * 64}})
    )
    with pytest.raises(InputError, match="another model"):
        polished(setup)


def test_a_polished_adapter_needs_no_correction(setup: Path) -> None:
    from emulators import write_emulator

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


def test_every_row_is_taken_once_in_a_round(setup: Path) -> None:
    rows = TrainRows.read(setup / "train.jsonl", load_tokenizer(setup / "model"), 64, 3, 0)
    first = [tuple(row.input_ids) for step in range(3) for row in rows.batch(step)]
    second = [tuple(row.input_ids) for step in range(3, 6) for row in rows.batch(step)]
    assert sorted(first) == sorted(second) == sorted(tuple(row.input_ids) for row in rows.rows)
    assert first != second


def test_the_rate_rises_then_falls_to_zero_behind_the_last_step() -> None:
    settings = Settings(6, 1, 1, 1.0, 2, 1.0, 8, 1, None, 0)
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
