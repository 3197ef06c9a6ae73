"""Emulators with quantized factors: what compile reports, what a budget chooses, and that they can be trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import FactorDtype, keep_ratio, known_factor_dtype
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime import load_emulator, train_lora
from onelayer.runtime.cli.app import app
from onelayer.runtime.planning.plan import size_for

FACTOR_DTYPES: tuple[FactorDtype, ...] = ("bf16", "int8", "nf4")
TEXTS = ["the quick brown fox jumps over the lazy dog " * 2, "what is the sum of two and three ?", "name a city ; rome"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize")
    save_tiny("qwen2", directory / "original", shards=2)
    tiny_tokenizer(directory / "original")
    (directory / "mix.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8))
    return directory


def compiled(root: Path, output: Path, **options: Any) -> Any:
    settings = {"max_length": 24, "samples": 12, **options}
    return compile_emulator(root / "original", root / "mix.jsonl", output, **settings)


@pytest.mark.parametrize("factor_dtype", [None, *FACTOR_DTYPES])
def test_the_report_is_of_what_is_stored(root: Path, factor_dtype: FactorDtype | None, tmp_path: Path) -> None:
    result = compiled(root, tmp_path / "emulator", ratio=0.5, factor_dtype=factor_dtype)
    emulator, document = Emulator.open(tmp_path / "emulator"), read_json(tmp_path / "emulator/emulator.json")
    assert document["settings"]["factor_dtype"] == factor_dtype
    assert emulator.facts.quantized_dtype == factor_dtype
    stored = sum(info.size_bytes for name, info in emulator.checkpoint.tensors.items() if ".lr_" in name)
    weights = sum(out * width for out, width in (emulator.shape(item.name) for item in result.linears))
    assert result.kept_bytes_share == pytest.approx(stored / (2 * weights), rel=1e-4)
    for item in result.linears:
        assert item.form == "factors"
        assert (item.unquantised_error is None) == (factor_dtype is None)
        if factor_dtype is not None:
            assert item.error >= item.unquantised_error * 0.999 >= 0.99 * item.optimal_error
    again = compiled(root, tmp_path / "again", ratio=0.5, factor_dtype=factor_dtype)
    assert emulator.digest == Emulator.open(again.output).digest


def test_at_the_top_of_the_scale_every_linear_is_quantized_whole(root: Path, tmp_path: Path) -> None:
    result = compiled(root, tmp_path / "emulator", keep_bytes=0.9, factor_dtype="nf4")
    assert {item.form for item in result.linears} == {"dense"}
    assert result.parameters_after == result.parameters_before
    facts = Emulator.open(tmp_path / "emulator").facts
    assert (facts.ranks, len(facts.quantized_dense)) == ({}, 14)
    assert all(0.05 < item.error < 0.13 for item in result.linears)
    with pytest.raises(InputError, match="whole weights"):
        slice_emulator(tmp_path / "emulator", 0.5, tmp_path / "slice")


@pytest.mark.parametrize("factor_dtype", ["int8", "nf4"])
def test_ranks_by_spectrum_keep_the_bytes_and_err_less(root: Path, factor_dtype: FactorDtype, tmp_path: Path) -> None:
    uniform = compiled(root, tmp_path / "uniform", ratio=0.6, factor_dtype=factor_dtype)
    spectrum = compiled(root, tmp_path / "spectrum", ratio=0.6, factor_dtype=factor_dtype, rank_allocation="spectrum")
    assert spectrum.kept_bytes_share <= uniform.kept_bytes_share
    assert {item.form for item in spectrum.linears} == {"dense", "factors"}
    assert sum(item.error**2 for item in spectrum.linears) < sum(item.error**2 for item in uniform.linears)
    emulator = Emulator.open(tmp_path / "spectrum")
    whole = {item.name for item in spectrum.linears if item.form == "dense"}
    assert whole == set(emulator.facts.quantized_dense)
    held = {name.removesuffix(".lr_dense") for name in emulator.checkpoint.tensors if name.endswith(".lr_dense")}
    assert held == whole
    assert not any(f"{name}.lr_up" in emulator.checkpoint.tensors for name in whole)
    assert sum(parameter.numel() for parameter in load_emulator(tmp_path / "spectrum").parameters()) > 0


def test_it_trains_and_the_adapter_is_the_same_twice(root: Path, tmp_path: Path) -> None:
    compiled(root, tmp_path / "emulator", ratio=0.6, factor_dtype="nf4", rank_allocation="spectrum")
    for name in ("one", "two"):
        done = train_lora(tmp_path / "emulator", root / "mix.jsonl", tmp_path / name, max_steps=3, batch_size=4)
        assert 0 < done.train_loss < 10
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "factor_dtype", "allocation"),
    [
        ({}, "nf4", "spectrum"),
        ({"keep_bytes": 0.5}, "int8", "spectrum"),
        ({"keep_bytes": 0.9}, "int8", "spectrum"),
        ({"keep_bytes": 0.2, "factor_dtype": "int8", "rank_allocation": "uniform"}, "int8", "uniform"),
        ({"ratio": 0.3}, None, "uniform"),
    ],
)
def test_bytes_choose_dtype_and_ranks_and_a_ratio_is_the_published_method(
    root: Path, tmp_path: Path, options: dict[str, Any], factor_dtype: str | None, allocation: str
) -> None:
    compiled(root, tmp_path / "emulator", **options)
    settings = read_json(tmp_path / "emulator/emulator.json")["settings"]
    assert (settings["factor_dtype"], settings["rank_allocation"]) == (factor_dtype, allocation)
    if "ratio" not in options:
        expected = keep_ratio(options.get("keep_bytes", 0.25), known_factor_dtype(factor_dtype), 4)
        assert settings["ratio"] == pytest.approx(expected)


def test_what_a_person_can_get_wrong(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"factor_dtype": "int4"}, "--factor-dtype int4: is none of bf16, int8, nf4"),
        ({"ratio": 0.2, "keep_bytes": 0.2}, "give one of them"),
        ({"keep_bytes": 1.5}, "--keep-bytes 1.5: must lie between"),
        ({"ratio": 1.0}, "must lie between"),
    ):
        with pytest.raises(InputError, match=message):
            compiled(root, tmp_path / "emulator", **options)
    compiled(root, tmp_path / "emulator", factor_dtype="nf4")
    config = read_json(tmp_path / "emulator/config.json")
    del config["quantization_config"]["shapes"]["model.layers.0.mlp.up_proj"]
    write_json(tmp_path / "emulator/config.json", config)
    with pytest.raises(InputError, match="shapes of all modules"):
        Emulator.open(tmp_path / "emulator")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match=r"pip install 'onelayer\[quantized\]'"):
        compiled(root, tmp_path / "without", factor_dtype="nf4")
    compiled(root, tmp_path / "int8", factor_dtype="int8")
    with pytest.raises(InputError, match="bitsandbytes"):
        load_emulator(tmp_path / "emulator")


def test_the_command_line_says_it_too(root: Path, tmp_path: Path) -> None:
    arguments = ["compile", root / "original", "--calibration", root / "mix.jsonl", "--output", tmp_path / "emulator"]
    options = ["--keep-bytes", "0.1", "--factor-dtype", "nf4", "--samples", "6", "--max-length", "24", "--json"]
    done = CliRunner().invoke(app, [str(item) for item in (*arguments, *options)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["linears"][0].keys() >= {"name", "rank", "error", "optimal_error", "unquantised_error"}
    assert read_json(tmp_path / "emulator/emulator.json")["settings"]["ratio"] == pytest.approx(0.2 / 0.53125)


def test_a_card_chooses_the_size_on_the_command_line(root: Path, tmp_path: Path) -> None:
    arguments = ["compile", root / "original", "--calibration", root / "mix.jsonl", "--output", tmp_path / "emulator"]
    options = ["--memory", "1GiB", "--samples", "6", "--max-length", "24", "--json"]
    refused = CliRunner().invoke(app, [str(item) for item in (*arguments, *options, "--ratio", "0.2")])
    assert "--memory: chooses the ratio" in str(refused.exception)
    done = CliRunner().invoke(app, [str(item) for item in (*arguments, *options)])
    assert done.exit_code == 0, done.output
    settings = read_json(tmp_path / "emulator/emulator.json")["settings"]
    found = settings["ratio"], settings["factor_dtype"], settings["rank_allocation"]
    size = size_for(root / "original", 1 << 30)
    assert found == (size.ratio, size.factor_dtype, "spectrum")
