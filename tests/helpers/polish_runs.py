"""Polishes of a tiny model, the same steps with the whole model in memory, and the files that both write."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.peft_adapters import load_adapter, load_original, random_adapter
from helpers.tiny_models import CORPUS, save_tiny
from onelayer.compiler import polish_adapter
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.data.train_rows import TrainRows
from onelayer.compiler.polish.command import PolishResult
from onelayer.compiler.polish.settings import PolishSettings

WORDS = CORPUS[0].split()


def prepare(directory: Path, name: str = "llama", target_modules: str | list[str] = "all-linear") -> Path:
    """Make a tiny model, training rows, held-out rows and an adapter in `directory`."""
    save_tiny(name, directory / "model")
    write_rows(directory)
    original = load_original(directory / "model")
    random_adapter(original, directory / "adapter", size=0.05, r=3, target_modules=target_modules)
    return directory


def write_rows(directory: Path) -> None:
    """Write nine short rows for training and a longer one for validation."""
    rows = [
        {"prompt": " ".join(WORDS[i : i + 4]), "completion": " " + " ".join(WORDS[i + 4 : i + 9])} for i in range(9)
    ]
    (directory / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (directory / "dev.jsonl").write_text(json.dumps({"text": " ".join(reversed(WORDS))}))


def polished(setup: Path, **fields: Any) -> PolishResult:
    """Polish what `prepare` made; `fields` replace arguments."""
    arguments = {"steps": 3, "batch_size": 5, "learning_rate": 1e-2, "max_length": 64, **fields}
    adapter = arguments.pop("adapter", setup / "adapter")
    output = arguments.pop("output", setup / "out")
    data = arguments.pop("data", setup / "train.jsonl")
    return polish_adapter(adapter, model=setup / "model", data=data, output=output, **arguments)


def resident_steps(setup: Path, steps: int = 3, learning_rate: float = 1e-2) -> dict[str, torch.Tensor]:
    """Take the same steps with PEFT, torch and the whole model in memory; return B A of every module."""
    model = load_adapter(load_original(setup / "model"), setup / "adapter").train()
    settings = PolishSettings(steps=steps, batch_size=5, learning_rate=learning_rate, max_length=64)
    rows = TrainRows.read(setup / "train.jsonl", load_tokenizer(setup / "model"), 64, 5, 0)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(steps):
        batch = rows.batch(step)
        for tokens in batch:
            ids, labels = torch.tensor([tokens.input_ids]), torch.tensor([tokens.labels])
            total = sum(row.labeled for row in batch)
            model(input_ids=ids, labels=labels, num_items_in_batch=total).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return products(model)


def products(model: Any) -> dict[str, torch.Tensor]:
    """Compute the scaled B A of every adapted module."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter's file."""
    return load_file(directory / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    """Say whether two adapters are equal bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
