"""What a person sees while a pass runs: one bar, with the unit, its error and the peak."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator


class Bar:
    """Takes tqdm's place and keeps what it is told."""

    told: ClassVar[list[str]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings, self.n = settings, 0

    def update(self, count: int) -> None:
        self.n += count

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.told.append(text)

    def close(self) -> None:
        assert self.n == self.settings["total"]


def test_compile_shows_unit_error_and_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bar, "told", [])
    monkeypatch.setattr("onelayer.compiler.machine.console.tqdm", Bar)
    save_tiny("llama", tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the quick brown fox", "name a city")))
    result = compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5)
    for layer in range(2):
        worst = max(linear.error for linear in result.linears if f".{layer}." in linear.name)
        (line,) = [text for text in Bar.told if text.startswith(f"model.layers.{layer},")]
        assert line.startswith(f"model.layers.{layer}, error at most {worst:.3f}, peak ")
        assert line.endswith(" GiB")
