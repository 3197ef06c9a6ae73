"""What a user sees while a pass runs: one bar, with the unit, its error and the peak."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.machine.console import Progress


class Bar:
    """A replacement of tqdm that keeps the lines it gets."""

    told: ClassVar[list[str]] = []

    def __init__(self, total: int, *rest: Any) -> None:
        self.total, self.n = total, 0

    def update(self, count: int) -> None:
        self.n += count

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.told.append(text)

    def close(self) -> None:
        assert self.n == self.total


def test_compile_shows_unit_error_and_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bar, "told", [])
    monkeypatch.setattr("onelayer.compiler.machine.console.open_bar", Bar)
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


def test_lines_are_printed_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 20.0, 40.0, 50.0, 80.0))
    monkeypatch.setattr("onelayer.compiler.machine.console.time.monotonic", lambda: next(clock))
    with Progress(8, "compile") as progress:
        for count in range(4):
            progress.reached(count + 1, f"layers.{count}", 1 << 30, "error 0.125")
    assert capsys.readouterr().err.splitlines() == [
        "onelayer: compile: 2 of 8 units, layers.1, error 0.125, peak 1.00 GiB, 00:40 elapsed, about 02:00 left",
        "onelayer: compile: 4 of 8 units, layers.3, error 0.125, peak 1.00 GiB, 01:20 elapsed, about 01:20 left",
    ]
