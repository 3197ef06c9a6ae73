"""Refinement on rows that give numbers that are not finite: it works as if those rows were absent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.peft_adapters import load_original
from helpers.reference_emulators import dense_reference
from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.refine.calls import Call
from onelayer.compiler.refine.command import RefineResult, refine_emulator
from onelayer.compiler.streaming.unit_boundary import UnitInputs

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"
BAD = " 9"
SAMPLES = 12
SETTINGS: dict[str, Any] = {"samples": SAMPLES, "max_length": 20, "steps": 10, "step_samples": 4}


def begun(root: Path) -> None:
    """Make an original that maps a digit to infinity, an emulator of it, and two data sets."""
    model = causal("Qwen2")
    digit = tiny_tokenizer(root / "original").convert_tokens_to_ids(BAD.strip())
    with torch.no_grad():
        model.model.embed_tokens.weight[digit] = float("inf")
    model.save_pretrained(root / "original")
    texts = [TEXT[i:] + TEXT[:i] for i in range(SAMPLES - 1)]
    write(root / "clean.jsonl", texts)
    # Of the same length after the cut, and last, so that it is last in its batch.
    write(root / "bad.jsonl", [*texts, TEXT.replace(" ", f"{BAD} ", 2)])
    write(root / "worse.jsonl", [*texts[:-2], *[TEXT.replace(" ", f"{BAD} ", 2)] * 2])
    write(root / "hopeless.jsonl", [BAD * 40] * 3)
    compile_emulator(root / "original", root / "clean.jsonl", root / "emulator", ratio=0.4, max_length=20)


def write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def refined(root: Path, data: str, batch_size: int) -> RefineResult:
    return refine_emulator(
        root / "emulator", model=root / "original", calibration=root / f"{data}.jsonl",
        output=root / f"{data}-{batch_size}", batch_size=batch_size, **SETTINGS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    begun(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_sample_that_is_not_finite_is_as_if_it_were_not_there(root: Path, batch_size: int) -> None:
    """A row that is alone in its call changes no bit; in a call with others, only the order of sums changes."""
    clean, found = (refined(root, data, batch_size) for data in ("clean", "bad"))
    for one, other in zip(clean.units, found.units, strict=True):
        assert one.dropped_rows == 0
        assert other.dropped_rows > 0
        assert other.after < other.before
        assert other.before == pytest.approx(one.before, rel=1e-5)
        assert other.after == pytest.approx(one.after, rel=1e-4)
    emulators = [Emulator.open(result.output) for result in (clean, found)]
    for name in emulators[0].facts.compressed:
        for one_factor, other_factor in zip(*(emulator.factors(name) for emulator in emulators), strict=True):
            assert one_factor is not None
            assert other_factor is not None
            if batch_size == 1:
                assert torch.equal(one_factor, other_factor)
            torch.testing.assert_close(one_factor, other_factor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data", ["worse", "hopeless"])
def test_more_than_a_tenth_of_the_rows_is_no_outlier(root: Path, data: str) -> None:
    with pytest.raises(RuntimeError, match=r"layers\.0: \d+ of \d+ calibration rows are not finite, more than 10%"):
        refined(root, data, 1)


def test_of_a_sample_only_the_rows_that_are_not_finite_are_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported errors are those of all other rows of the emulators in memory."""
    real = Call.of

    def spoilt(samples: int, kept: UnitInputs, outputs: Any) -> Call:
        """Return outputs as if the original had overflowed at the first position."""
        spoilt_outputs = outputs[0].clone()  # a copy: what went into containers is unchanged
        spoilt_outputs[:, 0, 3] = float("inf")
        return real(samples, kept, spoilt_outputs)

    monkeypatch.setattr(Call, "of", spoilt)
    given: dict[str, Any] = {**SETTINGS, "samples": SAMPLES - 1, "batch_size": 4}
    told = refine_emulator(
        root / "emulator", model=root / "original", calibration=root / "clean.jsonl", output=tmp_path / "out", **given
    ).units[0]
    assert told.dropped_rows == SAMPLES - 1
    original = load_original(root / "original")
    tokens = read_tokens(root / "clean.jsonl", load_tokenizer(root / "original"), 20)
    batches = make_batches(tokens, original.config, 4)
    exact = first_layer(original, batches)
    for path, error in ((root / "emulator", told.before), (tmp_path / "out", told.after)):
        found = first_layer(dense_reference(load_original(root / "original"), path), batches)
        pairs = [(got[:, 1:], want[:, 1:]) for got, want in zip(found, exact, strict=True)]
        lost = [float((got - want).square().mean() / want.square().mean()) * len(got) for got, want in pairs]
        assert error == pytest.approx((sum(lost) / (SAMPLES - 1)) ** 0.5, rel=1e-4)
    assert told.after < told.before


def first_layer(model: Any, batches: list[TokenBatch]) -> list[torch.Tensor]:
    """Collect the outputs of a resident model's first layer, one for each batch."""
    outputs: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    handle.remove()
    return outputs
