"""Refinement on the emulator's own inputs: equal to a resident model's training; it resumes; the whole comes nearer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.dying_refinement import die_at_second_unit
from helpers.layer_training import Training, trained_factors, watched
from helpers.peft_adapters import load_original
from helpers.reference_emulators import dense_reference
from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.refine.command import RefineResult, refine_emulator
from onelayer.compiler.refine.settings import RefineSettings
from onelayer.compiler.storage.checkpoint import model_digest

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"
DATA: dict[str, Any] = {"samples": 12, "max_length": 24, "batch_size": 4}
STEPS, RATE, STEP_SAMPLES = 30, 0.02, 8


def begun(root: Path, name: str) -> Path:
    save_tiny(name, root / "original")
    (root / "text.txt").write_text("\n".join(TEXT[i:] + TEXT[:i] for i in range(24)))
    compile_emulator(root / "original", root / "text.txt", root / "emulator", ratio=0.4, **DATA)
    return root


def refined(root: Path, output: Path, **changes: Any) -> RefineResult:
    given = {"steps": STEPS, "learning_rate": RATE, "step_samples": STEP_SAMPLES, "inputs": "emulator", **DATA}
    return refine_emulator(
        root / "emulator",
        model=root / "original",
        calibration=str(root / "text.txt"),
        output=output,
        **{**given, **changes},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(tmp_path_factory.mktemp("own-inputs"), "qwen2")


@pytest.fixture(scope="module")
def result(root: Path) -> RefineResult:
    return refined(root, root / "refined")


def read(root: Path, model: Any) -> list[TokenBatch]:
    tokens = read_tokens(str(root / "text.txt"), load_tokenizer(root / "original"), 24, 12, 0)
    return make_batches(tokens, model.config, DATA["batch_size"])


def test_layers_learn_from_what_the_refined_layers_before_give(root: Path, result: RefineResult) -> None:
    original: Any = load_original(root / "original")
    batches, emulator = read(root, original), Emulator.open(root / "emulator")
    found = Emulator.open(root / "refined")
    own, exact = (
        watched(model, batches)
        for model in (dense_reference(load_original(root / "original"), root / "refined"), original)
    )
    for number, unit in enumerate(result.units):
        calls = [(a[0], a[1], b[2]) for a, b in zip(own[number], exact[number], strict=True)]
        position = next(each.position for each in StreamedModel(root / "original").units if each.name == unit.name)
        training = Training(STEPS, RATE, STEP_SAMPLES, position)
        sizes = [batch.shape[0] for batch in batches]
        for name, factors in trained_factors(original, emulator, unit.name, calls, sizes, training).items():
            for one, other in zip(found.factors(name), factors, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        lost = [
            float((got[2] - want[2]).square().mean() / want[2].square().mean())
            for got, want in zip(own[number], exact[number], strict=True)
        ]
        assert unit.after == pytest.approx((sum(lost) / len(lost)) ** 0.5, rel=1e-3)


def test_the_last_layer_comes_nearer_than_on_the_originals_inputs(
    root: Path, result: RefineResult, tmp_path: Path
) -> None:
    refined(root, tmp_path / "plain", inputs="original")
    batches = read(root, load_original(root / "original"))
    exact, own, plain = (
        torch.cat([call[2].flatten() for call in watched(model, batches)[-1]])
        for model in (
            load_original(root / "original"),
            dense_reference(load_original(root / "original"), root / "refined"),
            dense_reference(load_original(root / "original"), tmp_path / "plain"),
        )
    )
    assert (own - exact).norm() < (plain - exact).norm()


def test_a_killed_run_resumes_and_writes_the_same_weights(
    root: Path, result: RefineResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = die_at_second_unit(monkeypatch)
    with pytest.raises(MemoryError):
        refined(root, tmp_path / "out")
    again = refined(root, tmp_path / "out")
    assert trained == ["model.layers.0", "model.layers.1", "model.layers.1"]
    assert model_digest(tmp_path / "out") == model_digest(root / "refined")
    assert again.units == result.units


@pytest.mark.parametrize("name", ["bert", "t5", "mixtral", "gemma3"])
def test_any_architecture(name: str, tmp_path: Path) -> None:
    units = refined(begun(tmp_path, name), tmp_path / "refined", steps=20, learning_rate=0.01).units
    assert len(units) > 1
    assert sum(unit.after < unit.before for unit in units) > len(units) // 2


def test_whose_inputs_they_are(root: Path, result: RefineResult) -> None:
    settings = [json.loads((root / name / "emulator.json").read_text()) for name in ("emulator", "refined")]
    assert settings[1]["refined"]["settings"]["inputs"] == "emulator"
    chosen = {
        (inputs, coded): RefineSettings(inputs=inputs).resolved(coded=coded)
        for inputs in (None, "original", "emulator")
        for coded in (False, True)
    }
    assert [key for key, each in chosen.items() if each.inputs == "emulator"] == [
        (None, True),
        ("emulator", False),
        ("emulator", True),
    ]
    assert {key[1]: each.learning_rate for key, each in chosen.items()} == {False: 0.01, True: 0.03}
    assert "inputs" not in chosen[None, False].recorded(), "records from before there was a choice stay valid"
    assert RefineSettings(backward=True).resolved(coded=True).inputs == "original"
    with pytest.raises(InputError, match="--inputs emulator: gradients are known for the original's inputs alone"):
        RefineSettings.of({"inputs": "emulator", "backward": True})
