"""Low-rank factors weighted by gradients: nearer for what flows back than plain ones; a stop changes no byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.loss_moments import moments
from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.compile.settings import CompileSettings
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator

TEXTS = ["the quick brown fox jumps over the lazy dog " * 2, "what is the sum of two and three ?", "name a city ; rome"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    save_tiny("llama", directory / "model")
    tiny_tokenizer(directory / "model")
    (directory / "mix.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    return directory


def compiled(source: Path, output: Path, **settings: Any) -> Emulator:
    given = {"ratio": 0.4, "max_length": 24, "device": "cpu", "backward": True, **settings}
    compile_emulator(source / "model", source / "mix.jsonl", output, **given)
    return Emulator.open(output)


@pytest.fixture(scope="module")
def emulator(source: Path) -> Emulator:
    return compiled(source, source / "emulator")


def lost(source: Path, emulator: Emulator) -> dict[str, float]:
    """Compute the relative error of each linear, weighted by whole moments of both sides, damped as in the product."""
    H, G = moments(source)
    original: Any = LlamaForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    found = {}
    for name in emulator.facts.compressed:
        W = original.get_submodule(name).weight.detach().double()
        first, second = emulator.factors(name)
        E = W - (first if second is None else first @ second).double()
        blocks = torch.block_diag(*(G[name][at : at + 64, at : at + 64] for at in range(0, len(W), 64)))
        blocks += 1e-2 * blocks.diagonal().mean() * torch.eye(len(W))
        found[name] = float((((blocks @ E @ H[name]) * E).sum() / ((blocks @ W @ H[name]) * W).sum()) ** 0.5)
    return found


@pytest.mark.parametrize("size", [{"ratio": 0.4}, {"ratio": None, "keep_bytes": 0.2, "factor_dtype": "int8"}])
def test_errors_told_are_weighted_and_below_those_of_plain_factors(source: Path, tmp_path: Path, size: Any) -> None:
    weighted = compiled(source, tmp_path / "weighted", **size)
    plain = compiled(source, tmp_path / "plain", **size, backward=None)
    errors, others = lost(source, weighted), lost(source, plain)
    document = json.loads((tmp_path / "weighted" / "emulator.json").read_text())
    told = {row["name"]: row["error"] for row in document["linears"]}
    assert errors == pytest.approx(told, rel=0.02)
    assert sum(errors[name] ** 2 for name in errors) < 0.98 * sum(others[name] ** 2 for name in others)
    assert document["settings"]["backward"] is True
    assert "backward" not in json.loads((tmp_path / "plain" / "emulator.json").read_text())["settings"]


def test_a_slice_is_what_a_smaller_compile_gives(source: Path, emulator: Emulator, tmp_path: Path) -> None:
    slice_emulator(emulator.directory, 0.2, tmp_path / "slice")
    small, sliced = compiled(source, tmp_path / "small", ratio=0.2), Emulator.open(tmp_path / "slice")
    for name in small.facts.ranks:
        (up, down), (other_up, other_down) = small.factors(name), sliced.factors(name)
        assert down is not None
        assert other_down is not None
        torch.testing.assert_close(up @ down, other_up @ other_down, rtol=1e-3, atol=1e-5)


def test_a_stopped_compile_goes_on_to_the_same_bytes(
    source: Path, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = Compilation.compressed, list[str]()

    def dying(self: Any, linears: Any, hooks: Any) -> Any:
        if begun:
            raise KeyboardInterrupt
        begun.append(min(linears))
        return real(self, linears, hooks)

    monkeypatch.setattr(Compilation, "compressed", dying)
    with pytest.raises(KeyboardInterrupt):
        compiled(source, tmp_path / "again")
    assert ".layers.1." in begun[0], "units are written on the way back"
    monkeypatch.undo()
    assert compiled(source, tmp_path / "again").digest == emulator.digest


def test_records_of_factors_without_a_pass_back_stay_as_they_were() -> None:
    chosen = CompileSettings.of({"ratio": 0.25}).resolved(2, is_bfloat16=True)
    assert not {"backward", "form", "keep_bytes"} & chosen.recorded().keys()
