"""The picture of an emulator: drawn from its own figures, in the format that the file's name asks for."""

import json
from pathlib import Path

import pytest

from onelayer.compiler.compile import compile_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.plot import plot_emulator
from tiny import save_tiny


def test_an_emulator_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog"}) + "\n")
    compile_emulator(tmp_path / "model", tmp_path / "mix.jsonl", tmp_path / "emulator", ratio=0.5)
    for name, start in {"a.png": b"\x89PNG", "a.svg": b"<?xml"}.items():
        plot_emulator(tmp_path / "emulator", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert "mlp.gate_proj" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 20_000


def test_what_is_no_emulator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emulator\.json"):
        plot_emulator(tmp_path, tmp_path / "a.png")
