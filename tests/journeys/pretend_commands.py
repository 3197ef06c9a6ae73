"""Every streamed command, and training, on a pretend accelerator: results as on the CPU, nothing left there."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import pretend_device
from helpers.peft_adapters import load_original, random_adapter
from helpers.pretend_counts import COUNTS
from helpers.pretend_trainer import let_trainer_use
from helpers.tiny_models import causal, save_tiny, tiny_tokenizer
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter, refine_emulator
from onelayer.compiler.results import Report
from onelayer.runtime import train_lora

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" for count in range(4)]
# A dense model, a mixture, an encoder and an encoder-decoder. An encoder has no loss to score, polish or correct by.
COMMANDS = {
    "llama": ["compile", "refine", "evaluate", "correct", "polish"],
    "wide llama": ["coded"],
    "mixtral": ["compile", "polish"],
    "bert": ["compile", "refine"],
    "t5": ["compile", "polish"],
}


# Linears wide enough for codes.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}

# What stays on a device: bitsandbytes keeps its table of levels.
TABLES_BYTES = 1024


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors can lie on the pretend device."""
    pretend_device.patch(monkeypatch)


def save_model(name: str, path: Path) -> None:
    """Save one model of `COMMANDS` with its tokenizer."""
    if name != "wide llama":
        save_tiny(name, path)
        return
    causal("Llama", **WIDE).save_pretrained(path)
    tiny_tokenizer(path)


@dataclass(frozen=True)
class Setup:
    """A tiny model with data, an emulator made on the CPU and, if it has a loss, an adapter."""

    path: Path
    name: str

    def run(self, command: str, device: str) -> tuple[list[float], Report]:
        """Run one command on a device; return its figures and its report."""
        model, data, output = self.path / "model", self.path / "data.jsonl", self.path / f"{command}-{device}"
        common: dict[str, Any] = {"max_length": 12, "batch_size": 2, "device": device}
        if command == "compile":
            compiled = compile_emulator(model, data, output, ratio=0.5, **common)
            return [item.error for item in [*compiled.linears, *compiled.stacks]], compiled.report
        if command == "coded":
            coded = compile_emulator(model, data, output, form="coded", keep_bytes=0.25, backward=False, **common)
            return [item.error for item in coded.linears], coded.report
        if command == "refine":
            training: dict[str, Any] = {"steps": 2, "step_samples": 4}
            refined = refine_emulator(
                self.path / "emulator", model=model, calibration=data, output=output, **training, **common
            )
            return [unit.after for unit in refined.units], refined.report
        if command == "evaluate":
            adapters = [self.path / "adapter"] if (self.path / "adapter").exists() else []
            scored = evaluate_model(model, data, adapters=adapters, against=self.path / "emulator", **common)
            assert scored.against is not None
            assert scored.against.kl_per_token is not None
            return [*(score.loss for score in scored.results), scored.against.kl_per_token], scored.report
        if command == "correct":
            corrected = correct_adapter(
                self.path / "adapter", emulator=self.path / "emulator", model=model, output=output, data=data, **common
            )
            assert corrected.candidates is not None
            return [candidate.loss for candidate in corrected.candidates], corrected.report
        polished = polish_adapter(None, model=model, data=data, output=output, lora_rank=2, steps=2, **common)
        return [step.loss for step in polished.steps], polished.report


@pytest.fixture(scope="module", params=COMMANDS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The files of one model, made on the CPU."""
    path: Path = tmp_path_factory.mktemp(request.param)
    save_model(request.param, path / "model")
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    compile_emulator(path / "model", path / "data.jsonl", path / "emulator", ratio=0.5, max_length=12)
    if "correct" in COMMANDS[request.param]:
        random_adapter(load_original(path / "model"), path / "adapter", size=0.1, r=2, target_modules=["q_proj"])
    return Setup(path, request.param)


@pytest.mark.usefixtures("pretend")
def test_every_streamed_command_gives_on_a_device_what_it_gives_on_the_cpu(setup: Setup) -> None:
    for command in COMMANDS[setup.name]:
        wanted, _ = setup.run(command, "cpu")
        gc.collect()
        before = COUNTS.allocated_bytes
        COUNTS.reset()
        found, report = setup.run(command, "pretend")
        assert found == pytest.approx(wanted, rel=2e-5, abs=3e-4), command
        assert 0 < report.peak_device_bytes == COUNTS.peak_bytes <= report.largest_unit_bytes + report.workspace_bytes
        gc.collect()
        assert COUNTS.allocated_bytes - before < TABLES_BYTES, f"{command} leaves bytes on the device"


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("form", ["nf4", "coded"])
def test_training_on_a_device_gives_the_losses_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    save_model("wide llama" if form == "coded" else "llama", tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    sizes: dict[str, dict[str, Any]] = {
        "nf4": {"keep_bytes": 0.3},
        "coded": {"form": "coded", "keep_bytes": 0.25, "backward": False},
    }
    compile_emulator(tmp_path / "model", data, tmp_path / "emulator", max_length=12, **sizes[form])
    losses: dict[str, Any] = {}
    for device in ("cpu", "pretend"):
        let_trainer_use(device, monkeypatch)
        COUNTS.reset()
        settings: dict[str, Any] = {
            "batch_size": 2,
            "max_length": 12,
            "activations": "layer",
            "args": {"dataloader_pin_memory": False},
        }
        result = train_lora(tmp_path / "emulator", data, tmp_path / device, max_steps=2, **settings)
        losses[device] = [loss for _, loss in result.losses]
    assert losses["pretend"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert result.peak_device_bytes == COUNTS.peak_bytes > 0
