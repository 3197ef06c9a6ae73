"""Passes over a tiny model on the pretend device, whose costs are counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter, refine_emulator
from onelayer.compiler.results import Report

Pass = Callable[[Path], Report]


def prepared(path: Path, layers: int, rows: int, **shape: Any) -> Path:
    """A model of so many layers, and rows of equal length that together determine all factors."""
    causal("Llama", num_hidden_layers=layers, **shape).save_pretrained(path / "model")
    tiny_tokenizer(path / "model")
    texts = [f"{count} the quick brown fox jumps over the lazy dog" for count in range(rows)]
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def compiled(path: Path, output: str = "emulator", **settings: Any) -> Report:
    """Compile on the device."""
    given = {"ratio": 0.5, "max_length": 12, "batch_size": 1, "device": "pretend", **settings}
    return compile_emulator(path / "model", path / "data.jsonl", path / output, **given).report


def weighed(path: Path) -> Report:
    """Compile quantized factors, with the whole weights next to them, that a pass back weighs."""
    return compiled(path, output="weighed", ratio=None, keep_bytes=0.15, factor_dtype="int8", backward=True)


def coded(path: Path) -> Report:
    """Compile codes, for which a pass back comes by default."""
    return compiled(path, output="coded", ratio=None, keep_bytes=0.25, form="coded")


def refined(path: Path, steps: int = 1) -> Report:
    """Refine on the device what `compiled` made, with as many steps whatever the number of rows."""
    return refine_emulator(
        path / "emulator",
        model=path / "model",
        calibration=path / "data.jsonl",
        output=path / f"refined-{len(list(path.iterdir()))}",
        steps=steps,
        step_samples=2,
        max_length=12,
        batch_size=1,
        device="pretend",
    ).report


def evaluated(path: Path) -> Report:
    """Score the original on the device."""
    return evaluate_model(path / "model", path / "data.jsonl", max_length=12, batch_size=1, device="pretend").report


def corrected(path: Path) -> Report:
    """Choose a correction on the device."""
    given: dict[str, Any] = {"emulator": path / "emulator", "model": path / "model", "output": path / "corrected"}
    sizes: dict[str, Any] = {"max_length": 12, "batch_size": 1}
    return correct_adapter(path / "adapter", **given, data=path / "data.jsonl", **sizes, device="pretend").report


def polished(path: Path) -> Report:
    """Take an exact step on the device."""
    given: dict[str, Any] = {"model": path / "model", "data": path / "data.jsonl", "output": path / "polished"}
    sizes: dict[str, Any] = {"lora_rank": 2, "steps": 1, "batch_size": 8, "micro_batch_size": 1, "max_length": 12}
    return polish_adapter(None, **given, **sizes, device="pretend").report
