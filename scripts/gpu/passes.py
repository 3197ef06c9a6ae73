"""The passes that a GPU is checked with: a model of a given shape, its data, and one function for each pass."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter, refine_emulator
from onelayer.runtime import train_lora

WORDS = 300
# Runs one pass; gives its figures and its report.
Pass = Callable[[], tuple[list[float], dict[str, Any]]]


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes and those of its data; `config` overrides the defaults of `LlamaConfig`."""

    config: dict[str, Any]
    dtype: str
    rows: int
    tokens: int
    refine_steps: int


TINY = Shape(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "float32",
    rows=4,
    tokens=8,
    refine_steps=2,
)
# Two layers and the head of Llama 3 8B: more layers would take longer and show nothing else.
SHAPED_8B = Shape(
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "bfloat16",
    rows=16,
    tokens=512,
    refine_steps=8,
)


def make_files(path: Path, shape: Shape, device: torch.device) -> None:
    """Write a random model with a tokenizer of words, and rows of random words, below `path`."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    with torch.device("cpu" if device.type == "pretend" else device):
        config = transformers.LlamaConfig(**shape.config, **fields, dtype=shape.dtype)
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, shape.dtype))
    model.to("cpu").save_pretrained(path / "model")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special: Any = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(path / "model"))
    ids = torch.randint(3, WORDS, (shape.rows, shape.tokens), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) for row in ids]
    (path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")


def passes(path: Path, shape: Shape, device: str) -> dict[str, Pass]:
    """Return every pass by name, in running order; each gives its figures and its report, and writes below `path`."""
    model, data, out = path / "model", path / "data.jsonl", path / device
    common: dict[str, Any] = {"max_length": shape.tokens, "batch_size": 2, "device": device}

    def compiled(name: str, **settings: Any) -> tuple[list[float], dict[str, Any]]:
        result = compile_emulator(model, data, out / name, **settings, **common)
        return [linear.error for linear in result.linears], result.report.model_dump()

    def refined() -> tuple[list[float], dict[str, Any]]:
        steps: dict[str, Any] = {"steps": shape.refine_steps, "step_samples": 2}
        given: dict[str, Any] = {"model": model, "calibration": data, "output": out / "refined"}
        result = refine_emulator(out / "factors", **given, **steps, **common)
        return [unit.after for unit in result.units], result.report.model_dump()

    def trained() -> tuple[list[float], dict[str, Any]]:
        settings: dict[str, Any] = {"max_length": shape.tokens, "batch_size": 2, "max_steps": 3, "save_steps": 100}
        args = {"dataloader_pin_memory": device != "pretend", "use_cpu": device == "cpu"}
        result = train_lora(out / "factors", data, out / "adapter", **settings, args=args)
        return [loss for _, loss in result.losses], {"peak_device_bytes": result.peak_device_bytes}

    def stepped() -> tuple[list[float], dict[str, Any]]:
        steps: dict[str, Any] = {"lora_rank": 8, "steps": 1, "batch_size": shape.rows, "micro_batch_size": 2}
        given: dict[str, Any] = {"model": model, "data": data, "output": out / "polished"}
        result = polish_adapter(None, **given, **steps, max_length=shape.tokens, device=device)
        return [step.loss for step in result.steps], result.report.model_dump()

    def corrected() -> tuple[list[float], dict[str, Any]]:
        given: dict[str, Any] = {"emulator": out / "factors", "model": model, "output": out / "corrected"}
        result = correct_adapter(out / "adapter", **given, data=data, **common)
        assert result.candidates is not None
        return [candidate.loss for candidate in result.candidates], result.report.model_dump()

    def evaluated() -> tuple[list[float], dict[str, Any]]:
        result = evaluate_model(model, data, adapters=[out / "adapter"], against=out / "factors", **common)
        return [score.loss for score in result.results], result.report.model_dump()

    return {
        "compile to factors": lambda: compiled("factors", ratio=0.25),
        "compile to nf4": lambda: compiled("nf4", form="factors", keep_bytes=0.25),
        "refine": refined,
        "training steps": trained,
        "exact step": stepped,
        "correct": corrected,
        "evaluate": evaluated,
    }
