"""The plot of an emulator: drawn from its own figures, in the format that the file's name asks for."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.emulators.plot import plot_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.refine.command import refine_emulator


def test_an_emulator_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog"}) + "\n")
    compile_emulator(tmp_path / "model", tmp_path / "mix.jsonl", tmp_path / "emulator", ratio=0.5)
    for name, start in {"a.png": b"\x89PNG", "a.svg": b"<?xml"}.items():
        plot_emulator(tmp_path / "emulator", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert "mlp.gate_proj" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 20_000


def test_of_a_refined_emulator_the_layers_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "mix.txt").write_text("the quick brown fox jumps over the lazy dog\n")
    compile_emulator(tmp_path / "model", tmp_path / "mix.txt", tmp_path / "emulator", ratio=0.5)
    given: dict[str, Any] = {
        "model": tmp_path / "model",
        "calibration": tmp_path / "mix.txt",
        "output": tmp_path / "refined",
    }
    units = refine_emulator(tmp_path / "emulator", steps=3, **given).units
    drawn: list[Any] = []
    real = figure.Figure.savefig

    def saved(self: Any, *args: Any, **fields: Any) -> None:
        drawn.append(self)
        real(self, *args, **fields)

    monkeypatch.setattr(figure.Figure, "savefig", saved)
    plot_emulator(tmp_path / "refined", tmp_path / "a.png")
    errors, spectra = drawn[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in errors.lines}
    assert curves == {
        "model.layers, as compiled": [unit.before for unit in units],
        "model.layers, refined": [unit.after for unit in units],
    }
    assert "mlp.gate_proj" in {line.get_label() for line in spectra.lines}


def test_what_is_no_emulator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emulator\.json"):
        plot_emulator(tmp_path, tmp_path / "a.png")
