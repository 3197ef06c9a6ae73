"""Slices of an emulator: the same numbers as compiling the smaller one from the original."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.peft_adapters import random_adapter
from helpers.reference_emulators import FACTOR_DTYPES, products
from helpers.tiny_models import save_tiny, tiny_llama
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import known_factor_dtype
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import read_json, write_json

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"


def compiled(root: Path, name: str, ratio: float) -> Path:
    kind = known_factor_dtype(root.name.split("-")[1])
    settings: dict[str, Any] = {"ratio": ratio, "samples": 16, "max_length": 48, "factor_dtype": kind}
    compile_emulator(root / "original", root / "text.txt", root / name, **settings)
    return root / name


@pytest.fixture(scope="module", params=FACTOR_DTYPES, ids=str)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an original, its text, and emulators that keep 0.6 of it, one for every factor dtype, named by it."""
    directory = tmp_path_factory.mktemp(f"slice-{request.param}-")
    save_tiny("qwen2", directory / "original", shards=2)
    (directory / "text.txt").write_text("\n".join(TEXT[i:] + TEXT[:i] for i in range(40)))
    compiled(directory, "large", 0.6)
    return directory


def is_packed(root: Path) -> bool:
    return Emulator.open(root / "large").facts.quantized_dtype is not None


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_it_is_the_emulator_that_compile_would_make(root: Path, tmp_path: Path) -> None:
    result = slice_emulator(root / "large", 0.25, tmp_path / "small")
    direct = compiled(root, "direct", 0.25)
    found, wanted = tensors(tmp_path / "small"), tensors(direct)
    assert found.keys() == wanted.keys()
    if is_packed(root):  # up and down were fitted to each other with more directions than are left
        ours_E, theirs_E = products(tmp_path / "small"), products(direct)
        rounding = 0.25 if Emulator.open(direct).facts.quantized_dtype == "nf4" else 0.02
        for name, product in theirs_E.items():
            assert float((ours_E[name] - product).norm()) < rounding * float(product.norm()), name
    for name, tensor in wanted.items():
        if not is_packed(root) or ".lr_" not in name:
            torch.testing.assert_close(found[name], tensor, msg=name)
    assert read_json(tmp_path / "small/config.json") == read_json(direct / "config.json")
    ours, theirs = read_json(tmp_path / "small/emulator.json"), read_json(direct / "emulator.json")
    for key in ("parameters_before", "parameters_after", "layer_parameters_before", "layer_parameters_after", "base"):
        assert ours[key] == theirs[key], key
    assert len(ours["linears"]) == len(theirs["linears"]) == 14
    for a, b in zip(ours["linears"], theirs["linears"], strict=True):
        assert (a["name"], a["rank"]) == (b["name"], b["rank"])
        assert a["error"] == pytest.approx(b["error"], rel=1e-3 if not is_packed(root) else 0.05, abs=1e-4)
        assert a["optimal_error"] == pytest.approx(b["optimal_error"], rel=1e-3, abs=1e-4)
        assert a["singular_values"] == pytest.approx(b["singular_values"], rel=1e-4)
    assert ours["digest"] == model_digest(tmp_path / "small")
    assert ours["sliced_from"] == {"digest": model_digest(root / "large"), "ratio": 0.6}
    assert ours["settings"]["ratio"] == 0.25
    assert result.parameters_after == ours["parameters_after"]


def test_factors_are_prefixes_and_the_rest_is_the_same_bytes(root: Path, tmp_path: Path) -> None:
    large, small = Checkpoint.open(root / "large"), tmp_path / "small"
    slice_emulator(root / "large", 0.3, small)
    sliced = Checkpoint.open(small)
    assert sliced.tensors.keys() == large.tensors.keys()
    assert {file.name for file in sliced.files} == {file.name for file in large.files}
    changed = 0
    for name, info in large.tensors.items():
        before, after = large.read(name), sliced.read(name)
        if name.endswith((".lr_up", ".lr_down")):
            by_columns = name.endswith("up") and not is_packed(root)
            assert torch.equal(after, before[:, : after.shape[1]] if by_columns else before[: after.shape[0]])
            changed += after.shape != before.shape
        else:
            assert (after.dtype, after.shape) == (before.dtype, info.shape)
            assert bytes(after.numpy().data) == bytes(before.numpy().data)
    assert changed == 28
    index = read_json(small / "emulator.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(info.size_bytes for info in sliced.tensors.values())
    for path in (root / "large").iterdir():
        if path.suffix != ".safetensors" and path.name not in {"config.json", "emulator.json", index_name(small)}:
            assert (small / path.name).read_bytes() == path.read_bytes()


def index_name(directory: Path) -> str:
    index = Checkpoint.open(directory).index_file
    assert index is not None
    return index.name


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_ranks_and_errors_follow_from_the_ratio(ratio: float, root: Path, tmp_path: Path) -> None:
    result = slice_emulator(root / "large", ratio, tmp_path / "small")
    json.dumps(result.model_dump(mode="json"), allow_nan=False)
    large = {item["name"]: item for item in read_json(root / "large/emulator.json")["linears"]}
    emulator = Emulator.open(tmp_path / "small")
    for linear in result.linears:
        figures = large[linear.name]
        assert linear.rank == rank_for(ratio, *emulator.shape(linear.name)) == emulator.facts.ranks[linear.name]
        energy = sum(value**2 for value in figures["singular_values"][: linear.rank])
        optimal = pytest.approx(math.sqrt(1 - energy / figures["output_energy"]), abs=1e-5)
        assert linear.optimal_error == optimal
        if is_packed(root):
            assert linear.error == figures["prefix_errors"][linear.rank - 1]
            assert linear.unquantised_error == optimal
        else:
            assert linear.error == optimal
        assert linear.error >= figures["error"]
    assert not result.requantised
    if is_packed(root):
        return
    before, after = (sum(t.numel() for t in tensors(path).values()) for path in (root / "large", tmp_path / "small"))
    removed = read_json(root / "large/emulator.json")["parameters_after"] - result.parameters_after
    assert before - after == removed > 0


def test_a_slice_of_a_slice_is_the_slice(root: Path, tmp_path: Path) -> None:
    slice_emulator(root / "large", 0.4, tmp_path / "middle")
    slice_emulator(tmp_path / "middle", 0.2, tmp_path / "twice")
    slice_emulator(root / "large", 0.2, tmp_path / "once")
    assert model_digest(tmp_path / "twice") == model_digest(tmp_path / "once")


def test_the_same_ratio_is_a_copy(root: Path, tmp_path: Path) -> None:
    slice_emulator(root / "large", 0.6, tmp_path / "same")
    before, after = tensors(root / "large"), tensors(tmp_path / "same")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_of_a_slice_can_be_corrected(root: Path, tmp_path: Path) -> None:
    slice_emulator(root / "large", 0.2, tmp_path / "small")
    random_adapter(tiny_llama(), tmp_path / "adapter", r=2, target_modules=["down_proj"])
    result = correct_adapter(
        tmp_path / "adapter", emulator=tmp_path / "small", model=root / "original", output=tmp_path / "out"
    )
    assert all(linear.compressed for linear in result.linears)


def test_a_slice_that_would_stay_large_is_refused(root: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 16, "max_length": 48}
    # With ranks by spectrum, many linears are whole: less of them than of their factors is lost to rounding.
    compile_emulator(
        root / "original", root / "text.txt", tmp_path / "e", keep_bytes=0.4, factor_dtype="int8", **settings
    )
    facts = Emulator.open(tmp_path / "e").facts
    whole = len(facts.quantized_dense)
    assert whole > len(facts.ranks) / 2
    with pytest.raises(InputError, match=rf"holds {whole} of \d+ linears whole, which cannot be sliced, so 0\.\d+ of"):
        slice_emulator(tmp_path / "e", 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_cut_is_refused(root: Path, tmp_path: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (root / "large").iterdir()}
    for ratio in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="must lie between"):
            slice_emulator(root / "large", ratio, tmp_path / "out")
    with pytest.raises(InputError, match=r"keeps only 0\.6"):
        slice_emulator(root / "large", 0.61, tmp_path / "out")
    with pytest.raises(InputError, match="is not an emulator"):
        slice_emulator(root / "original", 0.2, tmp_path / "out")
    with pytest.raises(InputError, match="already holds files"):
        slice_emulator(root / "large", 0.2, root / "large")
    slice_emulator(root / "large", 0.5, tmp_path / "damaged")
    figures = read_json(tmp_path / "damaged/emulator.json")
    write_json(tmp_path / "damaged/emulator.json", {**figures, "linears": figures["linears"][1:]})
    with pytest.raises(InputError, match=r"do not agree with config\.json"):
        slice_emulator(tmp_path / "damaged", 0.2, tmp_path / "out")
    write_json(tmp_path / "damaged/emulator.json", {**figures, "settings": {}})
    with pytest.raises(InputError, match=r"field settings\.ratio"):
        slice_emulator(tmp_path / "damaged", 0.2, tmp_path / "out")
    (tmp_path / "damaged/emulator.json").unlink()
    with pytest.raises(InputError, match=r"emulator\.json: no such file"):
        slice_emulator(tmp_path / "damaged", 0.2, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (root / "large").iterdir()}
