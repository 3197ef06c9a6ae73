"""Compressed activations in other libraries' trainers, and emulators in their pipelines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from helpers.places import ROOT
from helpers.reference_emulators import emulator_and_texts
from helpers.resident_gradients import with_lora
from helpers.tiny_models import tiny_tokenizer
from onelayer.runtime import compress_activations, load_emulator

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "what is the sum", "of two and three", "it is five", "rome"]
# TRL 1.16 switches checkpointing on by a name that transformers 5.23 replaced.
TRL_OLD_NAMES = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator_and_texts(tmp_path_factory.mktemp("activations"), TEXTS)


def loader_arguments(tmp_path: Path, **further: Any) -> dict[str, Any]:
    fixed = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3}
    return {
        **fixed,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        **further,
    }


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_the_transformers_trainer(place: Path, tmp_path: Path, where: Any) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(60).reshape(6, 10).tolist()]

    def run(rank: int | None, **further: Any) -> list[float]:
        model = with_lora(load_emulator(place / "emulator"))
        if rank is not None:
            compress_activations(model, rank=rank, where=where)
        arguments = TrainingArguments(**loader_arguments(tmp_path, learning_rate=1e-2, **further))
        return losses(Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows)))

    plain = run(None)
    assert run(32) == pytest.approx(plain, abs=1e-4)
    low = run(4)
    assert low[0] == plain[0]
    assert low[-1] != plain[-1]
    assert run(4, activation_checkpointing=True) == low  # not stacked, and not replaced


@TRL_OLD_NAMES
def test_sft_with_its_own_checkpointing_switched_on(place: Path, tmp_path: Path) -> None:
    def run(rank: int | None) -> list[float]:
        config = SFTConfig(**loader_arguments(tmp_path, learning_rate=1e-2, max_length=32))
        model = load_emulator(place / "emulator")
        if rank is not None:
            compress_activations(model, rank=rank)
        return losses(
            SFTTrainer(
                model=model,
                args=config,
                train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
                processing_class=tiny_tokenizer(),
                peft_config=LoraConfig(**LORA),
            )
        )

    plain = run(None)
    assert plain[-1] < plain[0]
    assert run(32) == pytest.approx(plain, abs=1e-4)
    assert run(2)[0] == plain[0]


@TRL_OLD_NAMES
def test_dpo(place: Path, tmp_path: Path) -> None:
    def run(rank: int | None) -> list[float]:
        config = DPOConfig(**loader_arguments(tmp_path, learning_rate=1e-2, max_length=48))
        model = load_emulator(place / "emulator")
        if rank is not None:
            compress_activations(model, rank=rank)
        rows = [{"prompt": text, "chosen": " it is eight", "rejected": " rome and blue"} for text in TEXTS]
        return losses(
            DPOTrainer(
                model=model,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tiny_tokenizer(),
                peft_config=LoraConfig(**LORA),
            )
        )

    plain = run(None)
    assert plain[0] == pytest.approx(0.6931, abs=1e-3)
    assert run(32) == pytest.approx(plain, abs=1e-4)
    assert run(2)[-1] < 0.69


@pytest.mark.slow
def test_trl_sft_from_the_command_line(place: Path, tmp_path: Path) -> None:
    """The script that `trl sft` runs, in a process that never imported onelayer: the emulator's own file loads it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text((place / "text.jsonl").read_text())
    command = [sys.executable, "-m", "trl.scripts.sft", "--model_name_or_path", str(place / "emulator")]
    command += ["--trust_remote_code", "--dataset_name", str(tmp_path / "data"), "--use_peft", "--lora_r", "4"]
    command += ["--lora_target_modules", "q_proj", "down_proj", "--max_steps", "2", "--max_length", "32"]
    command += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none", "--logging_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/compiler:{ROOT}/runtime", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, "--learning_rate", "1e-2"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    logged = [json.loads(line.replace("'", '"')) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    first = float(logged[0]["loss"])
    model = load_emulator(place / "emulator")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "emulator")
    texts = [json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines()]
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text).input_ids[:32]]) for text in texts]
        mean = sum(float(model(input_ids=ids, labels=ids).loss) for ids in rows) / len(rows)
    assert first == pytest.approx(mean, abs=0.3)  # random weights would give a very different loss
