"""Refinement: equal to a resident model's training in plain torch; units improve, bytes repeat, nothing is lost."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.dying_refinement import die_at_second_unit
from helpers.layer_training import Training, trained_factors, watched
from helpers.peft_adapters import load_original, random_adapter
from helpers.reference_emulators import FACTOR_DTYPES, dense_reference
from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import known_factor_dtype
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.refine.command import refine_emulator
from onelayer.compiler.refine.resume import RefineWork
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.digests import sha256_file
from onelayer.runtime import load_emulator

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"
SETTINGS: dict[str, Any] = {"samples": 12, "max_length": 24, "batch_size": 4}
STEPS = 30


def begun(root: Path, name: str = "qwen2", kind: Any = None, ratio: float = 0.4) -> Path:
    """Make an original, its text and an emulator of it."""
    save_tiny(name, root / "original")
    (root / "text.txt").write_text("\n".join(TEXT[i:] + TEXT[:i] for i in range(24)))
    compile_emulator(
        root / "original", root / "text.txt", root / "emulator", ratio=ratio, factor_dtype=kind, **SETTINGS
    )
    return root


def refined(root: Path, output: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"steps": STEPS, **SETTINGS, **changes}
    emulator = given.pop("emulator", root / "emulator")
    calibration = str(given.pop("calibration", root / "text.txt"))
    return refine_emulator(emulator, model=root / "original", calibration=calibration, output=output, **given)


@pytest.fixture(scope="module", params=FACTOR_DTYPES, ids=str)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in every factor dtype."""
    return begun(tmp_path_factory.mktemp(f"refine-{request.param}-"), kind=known_factor_dtype(str(request.param)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(tmp_path_factory.mktemp("refine-plain"))


def test_it_is_the_training_of_each_layer_of_a_resident_model(plain: Path, tmp_path: Path) -> None:
    rate, samples = 0.02, 8
    refined(plain, tmp_path / "refined", learning_rate=rate, step_samples=samples, seed=3)
    model: Any = load_original(plain / "original")
    emulator = Emulator.open(plain / "emulator")
    found = Emulator.open(tmp_path / "refined")
    tokens = read_tokens(
        str(plain / "text.txt"), load_tokenizer(plain / "original"), SETTINGS["max_length"], SETTINGS["samples"], 3
    )
    batches = make_batches(tokens, model.config, SETTINGS["batch_size"])
    for number, calls in enumerate(watched(model, batches)):
        prefix = f"model.layers.{number}"
        position = next(unit.position for unit in StreamedModel(plain / "original").units if unit.name == prefix)
        sizes, seed = [batch.shape[0] for batch in batches], 3 * 1_000_003 + position
        wanted = trained_factors(model, emulator, prefix, calls, sizes, Training(STEPS, rate, samples, seed))
        for name, factors in wanted.items():
            for one, other in zip(found.factors(name), factors, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_units_come_closer_to_the_original_at_the_same_bytes(root: Path, tmp_path: Path) -> None:
    result = refined(root, tmp_path / "refined")
    assert len(result.units) == 2
    assert all(unit.after < 0.97 * unit.before for unit in result.units)
    sizes = [
        {name: info.size_bytes for name, info in Checkpoint.open(path).tensors.items()}
        for path in (root / "emulator", tmp_path / "refined")
    ]
    assert sizes[0] == sizes[1]


def test_the_errors_told_are_those_of_the_emulator_in_memory(root: Path, tmp_path: Path) -> None:
    """The reported errors of the first layer, whose inputs are the same in both, equal those in memory."""
    told = refined(root, tmp_path / "refined").units[0]
    model: Any = load_original(root / "original")
    tokens = read_tokens(
        str(root / "text.txt"), load_tokenizer(root / "original"), SETTINGS["max_length"], SETTINGS["samples"], 0
    )
    batches = make_batches(tokens, model.config, SETTINGS["batch_size"])
    exact = watched(model, batches)[0]
    for path, error in ((root / "emulator", told.before), (tmp_path / "refined", told.after)):
        dense = dense_reference(load_original(root / "original"), path)
        pairs = zip(watched(dense, batches)[0], exact, strict=True)
        sizes = [batch.shape[0] for batch in batches]
        lost = [float((got[2] - want[2]).square().mean() / want[2].square().mean()) for got, want in pairs]
        found = (sum(size * part for size, part in zip(sizes, lost, strict=True)) / sum(sizes)) ** 0.5
        assert error == pytest.approx(found, rel=1e-4)


def hashes(directory: Path) -> dict[str, str]:
    """Hash every file by content; `emulator.json` without measured figures."""
    found = {file.name: sha256_file(file) for file in directory.iterdir() if file.name != "emulator.json"}
    document = json.loads((directory / "emulator.json").read_text())
    del document["refined"]["report"]
    return {**found, "emulator.json": json.dumps(document)}


def test_a_killed_run_resumes_and_writes_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined(root, tmp_path / "undisturbed")
    trained = die_at_second_unit(monkeypatch)
    with pytest.raises(MemoryError):
        refined(root, tmp_path / "refined")
    assert not (tmp_path / "refined").exists()
    result = refined(root, tmp_path / "refined")
    assert trained == ["model.layers.0", "model.layers.1", "model.layers.1"]
    assert [unit.name for unit in result.units] == ["model.layers.0", "model.layers.1"]
    assert hashes(tmp_path / "refined") == hashes(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refined", "undisturbed"]


def test_a_damaged_unit_is_made_again(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refined(plain, tmp_path / "undisturbed")
    work = tmp_path / ".refined.refine"

    def stopped(*given: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(RefineWork, "publish", stopped)
        with pytest.raises(MemoryError):
            refined(plain, tmp_path / "refined")
    file = work / "unit-00001.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    refined(plain, tmp_path / "refined")
    assert hashes(tmp_path / "refined") == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral", "gemma3"])
def test_any_architecture(name: str, tmp_path: Path) -> None:
    begun(tmp_path, name)
    result = refined(tmp_path, tmp_path / "refined", steps=40, learning_rate=0.01)
    assert result.units
    assert all(unit.after <= unit.before for unit in result.units)
    assert sum(unit.after < unit.before for unit in result.units) > len(result.units) // 2


def test_a_unit_that_gets_no_better_stays_as_it_was(plain: Path, tmp_path: Path) -> None:
    result = refined(plain, tmp_path / "refined", learning_rate=1e3)
    assert all(unit.after == unit.before for unit in result.units)
    before, after = Checkpoint.open(plain / "emulator"), Checkpoint.open(tmp_path / "refined")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_an_adapter_of_the_refined_emulator_is_corrected_with_its_factors(plain: Path, tmp_path: Path) -> None:
    refined(plain, tmp_path / "refined")
    random_adapter(load_emulator(tmp_path / "refined"), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    given: dict[str, Any] = {"model": plain / "original", "output": tmp_path / "corrected"}
    assert correct_adapter(tmp_path / "adapter", emulator=tmp_path / "refined", **given).linears


def test_a_step_takes_no_sample_twice_and_says_so(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.txt").write_text("\n\n".join(" ".join(TEXT.split()[i:]) for i in range(12)))
    for name, step_samples in (("all", 12), ("more", 100_000)):
        refined(plain, tmp_path / name, calibration=tmp_path / "rows.txt", steps=2, step_samples=step_samples)
    told = "onelayer: note: --step-samples 100000: there are 12 examples, a step takes each of them once\n"
    assert capsys.readouterr().err == told
    assert model_digest(tmp_path / "all") == model_digest(tmp_path / "more")


def test_bad_input_is_told_in_one_line(plain: Path, tmp_path: Path) -> None:
    refined(plain, tmp_path / "refined")
    with pytest.raises(InputError, match="refined and are in no order"):
        slice_emulator(tmp_path / "refined", 0.2, tmp_path / "small")
    for changes, message in (
        ({"steps": 0}, "--steps"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"emulator": plain / "original"}, "is not an emulator"),
    ):
        with pytest.raises(InputError, match=message):
            refined(plain, tmp_path / "other", **changes)
    save_tiny("llama", tmp_path / "another")
    with pytest.raises(InputError, match="give the original it was compiled from"):
        refine_emulator(
            plain / "emulator", model=tmp_path / "another", calibration=str(plain / "text.txt"), output=tmp_path / "o"
        )
    assert not (tmp_path / "other").exists()
