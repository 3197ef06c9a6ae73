"""LoRA training on emulators: what the loss counts, resuming, determinism, refusals, and the resulting adapter."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from helpers.training_rows import ROWS, TEXTS
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.tokens import load_tokenizer, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.runtime import TrainResult, train_lora
from onelayer.runtime.training import checkpoints
from onelayer.runtime.training.trainers import LoraTrainer

Train = Callable[..., TrainResult]


def expected_loss(model: Any, directory: Path, data: Path, rows: range) -> float:
    """Compute cross-entropy over the labeled tokens of examples, from the model's logits, one example at a time."""
    tokenizer = load_tokenizer(directory)
    total, count = 0.0, 0
    for example in [read_examples(data)[index] for index in rows]:
        tokens = tokenize(example, tokenizer, 512, append_eos=True)
        with torch.no_grad():
            logits = model(torch.tensor([tokens.input_ids])).logits[0, :-1]
        labels = torch.tensor(tokens.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += tokens.labeled
    return total / count


@pytest.mark.parametrize("form", ROWS)
def test_the_loss_counts_exactly_the_labeled_tokens(train: Train, place: Path, form: str) -> None:
    result = train(emulator="exact", data=form, max_steps=1, batch_size=len(TEXTS))
    original = transformers.AutoModelForCausalLM.from_pretrained(place / "original")
    wanted = expected_loss(original, place / "original", place / f"{form}.jsonl", range(len(TEXTS)))
    assert result.train_loss == pytest.approx(wanted, abs=2e-5)
    assert result.steps == 1


def test_padding_and_accumulation_leave_the_loss_per_token(train: Train) -> None:
    whole = train("whole", data="pairs", max_steps=1, batch_size=6)
    parts = train("parts", data="pairs", max_steps=1, batch_size=2, gradient_accumulation=3)
    assert parts.train_loss == pytest.approx(whole.train_loss, abs=1e-5)


def test_training_learns_and_reports(train: Train, tmp_path: Path) -> None:
    result = train(max_steps=12, batch_size=6, learning_rate=2e-2)
    first = train("first", max_steps=1, batch_size=6)
    assert result.train_loss < first.train_loss - 0.2
    assert result.steps == 12
    assert result.trainable_parameters == 2 * (4 * (32 + 32) + 4 * (64 + 32))
    assert result.peak_device_bytes > 0
    assert result.seconds > 0
    assert not list(tmp_path.glob(".*"))
    assert json.loads(json.dumps(result.model_dump(mode="json")))["output"] == str(tmp_path / "adapter")


def test_cut_rows_are_told_before_the_first_step(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    real = LoraTrainer.training_step

    def step(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        told.append(capsys.readouterr().err)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(LoraTrainer, "training_step", step)
    result = train(max_steps=1, max_length=6)
    assert 0 < result.cut_examples < len(TEXTS)
    assert f"--max-length 6: {result.cut_examples} of 6 examples are longer and are cut" in told[0]


def test_every_step_on_a_cpu_returns_what_it_freed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths would not fit into the holes of the last step: 253 MiB more than planned in three steps."""
    returned: list[int] = []
    monkeypatch.setattr("onelayer.runtime.training.guarded.return_free_memory", lambda: returned.append(1))
    train(max_steps=2)
    assert len(returned) == 2


def test_saved_activations_follow_the_batch_and_checkpointing(train: Train) -> None:
    small = train("small", max_steps=1, batch_size=1).saved_activation_bytes
    large = train("large", max_steps=1, batch_size=6).saved_activation_bytes
    recomputed = train("less", max_steps=1, batch_size=6, args={"gradient_checkpointing": True}).saved_activation_bytes
    assert 4 * small < large
    assert recomputed < large / 2


class KilledError(Exception):
    """A simulated power failure."""


def test_the_old_checkpoint_goes_after_the_new_one_is_complete(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "args": {"save_steps": 1, "save_total_limit": 1}}
    work, marked = tmp_path / ".adapter.training", checkpoints.mark_complete

    kept, dies = list[list[str]](), [True]

    def mark(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2" and dies.pop():
            raise KilledError
        marked(checkpoint)
        kept.append(sorted(item.name for item in work.glob("checkpoint-*")))

    monkeypatch.setattr("onelayer.runtime.training.callbacks.mark_complete", mark)
    with pytest.raises(KilledError):
        train(**settings)
    assert checkpoints.newest_checkpoint(work) == work / "checkpoint-1"
    dies.append(False)
    assert train(resume=True, **settings).steps == 3
    names = [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert kept == [names[:1], names[:2], names[1:]]


def test_resuming_equals_not_stopping(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "lora": {"lora_dropout": 0.3}, "args": {"save_steps": 1}}
    whole = train("whole", **settings)
    step = LoraTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            (tmp_path / ".parts.training" / "checkpoint-2" / checkpoints.COMPLETE_FILE).unlink()  # killed while saving
            raise KilledError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", dying)
    with pytest.raises(KilledError):
        train("parts", **settings)
    monkeypatch.setattr(LoraTrainer, "training_step", step)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(InputError, match="continue it with --resume"):
        train("parts", **settings)
    with pytest.raises(InputError, match="begun with other args"):
        train("parts", **{**settings, "learning_rate": 2e-3}, resume=True)
    parts = train("parts", **settings, resume=True)
    assert parts.train_loss == whole.train_loss
    assert adapter_digest(tmp_path / "parts") == adapter_digest(tmp_path / "whole")
    assert not (tmp_path / ".parts.training").exists()


def test_an_early_failure_leaves_nothing(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise KilledError

    monkeypatch.setattr(LoraTrainer, "training_step", dying)
    with pytest.raises(KilledError):
        train()
    assert not list(tmp_path.iterdir())


def test_a_nonfinite_loss_stops_training(train: Train, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(max_steps=6, learning_rate=1e38)
    assert not (tmp_path / "adapter").exists()


def test_the_seed_decides_and_the_global_generators_stay(train: Train, tmp_path: Path) -> None:
    states = (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()))
    train("one", seed=5)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == str(numpy.random.get_state())
    torch.rand(7)  # earlier draws of the caller must not matter
    random.random()
    train("two", seed=5)
    train("three", seed=6)
    assert adapter_digest(tmp_path / "one") == adapter_digest(tmp_path / "two")
    assert adapter_digest(tmp_path / "one") != adapter_digest(tmp_path / "three")


def test_the_adapter_names_the_original_and_loads_on_it(train: Train, place: Path, tmp_path: Path) -> None:
    train(emulator="exact", max_steps=3, learning_rate=1e-2)
    adapter = tmp_path / "adapter"
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "onelayer.json"}
    assert {file.name for file in adapter.iterdir()} == files
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("example/original", "abc")
    card = (adapter / "README.md").read_text()
    assert str(place) not in card
    assert "base_model: example/original" in card
    assert "not yet corrected" in card
    record = json.loads((adapter / "onelayer.json").read_text())
    assert (record["kind"], record["corrected"]) == ("adapter", False)
    assert record["trained_on"] == {"path": str(place / "exact"), "digest": model_digest(place / "exact")}
    assert record["base"]["digest"] == model_digest(place / "original")
    assert len(Adapter.open(adapter).modules) == 4
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    models = [transformers.AutoModelForCausalLM.from_pretrained(place / name) for name in ("original", "exact")]
    with torch.no_grad():
        bare = models[0](ids).logits
        tuned = [peft.PeftModel.from_pretrained(model, str(adapter))(ids).logits for model in models]
    torch.testing.assert_close(tuned[0], tuned[1], atol=1e-4, rtol=0)
    assert (tuned[0] - bare).abs().max() > 1e-2


def test_plain_models_train_by_the_same_function(train: Train, place: Path, tmp_path: Path) -> None:
    train("direct", emulator="original", max_steps=3)
    train("exact", emulator="exact", max_steps=3)
    direct, exact = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("direct", "exact"))
    assert direct.keys() == exact.keys()
    for name, tensor in direct.items():
        torch.testing.assert_close(tensor, exact[name], atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "direct" / "onelayer.json").read_text())
    assert record["base"]["digest"] == record["trained_on"]["digest"] == model_digest(place / "original")
    assert record["base"]["model"] == str(place / "original")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_other_architectures_train(name: str, place: Path, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "original")
    emulator = write_emulator(model, tmp_path / "original", tmp_path / "emulator", ratio=0.5)
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 3, "epochs": None}
    train_lora(emulator, place / "messages.jsonl", tmp_path / "adapter", **settings)
    train_lora(tmp_path / "original", place / "messages.jsonl", tmp_path / "direct", **settings)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert not config["target_parameters"]
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    adapted = peft.PeftModel.from_pretrained(original, str(tmp_path / "adapter"))
    assert sum("lora_A" in key for key in adapted.state_dict()) == len(Adapter.open(tmp_path / "direct").modules)


def test_experts_of_a_mixture_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "original")
    targets = ["q_proj", "w1", "w2", "w3"]
    with pytest.raises(InputError, match=r"down_proj, gate_up_proj are experts or routers"):
        train_lora(tmp_path / "original", place / "text.jsonl", tmp_path / "adapter", target_modules=targets)


def test_bf16_emulators_train_with_a_float32_adapter(place: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "original", dtype=torch.bfloat16)
    emulator = write_emulator(model, tmp_path / "original", tmp_path / "emulator", ratio=0.5)
    result = train_lora(emulator, place / "text.jsonl", tmp_path / "adapter", max_steps=2, batch_size=2)
    assert result.train_loss > 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_epochs_and_examples_without_a_label(train: Train, place: Path) -> None:
    long = {"prompt": "the sum of two and three " * 4, "completion": "is five"}
    rows = [*ROWS["pairs"], long]
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(data="long", max_steps=None, epochs=2, batch_size=4, max_length=24)
    assert (result.steps, result.skipped_examples, result.cut_examples) == (4, 1, 1)


def test_lora_settings_reach_peft(train: Train, tmp_path: Path) -> None:
    train(lora={"alpha": 16, "dropout": 0.1, "use_rslora": True, "rank_pattern": {"q_proj": 2}})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 16, 0.1, True)
    shapes = {
        name.split(".")[-3]: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert shapes == {"q_proj": (2, 32), "down_proj": (4, 64)}


def test_nothing_is_printed_to_stdout(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    train()
    assert capfd.readouterr().out == ""
