"""Packed factors: the bytes themselves, the errors that compile reports of them, and what a budget buys."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from onelayer.compiler.compile import compile_emulator
from onelayer.compiler.emulator_reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factor_dtypes import FactorDtype, bytes_per_value, keep_ratio, linear_bytes, row_bytes
from onelayer.compiler.factorize import factorize
from onelayer.compiler.files import read_json, write_json
from onelayer.compiler.moments import Gram, Moments
from onelayer.compiler.quantised_factors import pack_dense, pack_factors
from onelayer.compiler.quantize import pack, unpack
from onelayer.compiler.ranks import Spectrum, allocate_by_spectrum, rank_for
from onelayer.compiler.slice import slice_emulator
from onelayer.runtime import load_emulator, train_lora
from onelayer.runtime.cli_commands import app
from tiny import save_tiny, tiny_tokenizer

KINDS: tuple[FactorDtype, ...] = ("bf16", "int8", "nf4")
CPU = torch.device("cpu")
# QLoRA's levels (arXiv 2305.14314, appendix E), to four digits.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.723, 1]
TEXTS = ["the quick brown fox jumps over the lazy dog " * 2, "what is the sum of two and three ?", "name a city ; rome"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 200), kind=st.sampled_from(KINDS), exponent=st.integers(-30, 30))
def test_packed_rows_have_their_size_and_come_back_to_within_the_step(
    rows: int, width: int, kind: FactorDtype, exponent: int
) -> None:
    matrix = random(rows, width, seed=width) * 2.0**exponent
    packed = pack(matrix, kind)
    assert (packed.shape, packed.dtype) == ((rows, row_bytes(width, kind)), torch.uint8)
    found = unpack(packed, width, kind, torch.float32).double()
    assert found.shape == matrix.shape
    blocks = torch.nn.functional.pad(matrix.abs(), (0, -width % 64)).reshape(rows, -1, 64).amax(-1)
    largest = blocks.repeat_interleave(64, dim=1)[:, :width]
    step = {"bf16": matrix.abs() / 256, "int8": largest * (0.5 / 127 + 2**-8), "nf4": largest * (0.16 + 2**-8)}[kind]
    assert ((found - matrix).abs() <= step).all()


def test_nf4_is_the_format_of_the_paper_and_int8_is_symmetric() -> None:
    matrix = random(3, 128)
    nf4 = unpack(pack(matrix, "nf4"), 128, "nf4", torch.float32).reshape(-1, 64)
    scales = matrix.reshape(-1, 64).abs().amax(1, keepdim=True).to(torch.bfloat16).float()
    levels = torch.tensor(NF4)
    nearest = (nf4 / scales)[:, :, None] - levels
    assert (nearest.abs().amin(-1) < 1e-4).all()
    ideal = levels[(matrix.reshape(-1, 64) / scales)[:, :, None].sub(levels).abs().argmin(-1)] * scales
    assert ((ideal - nf4).abs() > 1e-3 * scales).float().mean() < 0.01
    int8 = unpack(pack(-matrix, "int8"), 128, "int8", torch.float32)
    torch.testing.assert_close(int8, -unpack(pack(matrix, "int8"), 128, "int8", torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_the_first_rows_are_the_packed_first_rows(kind: FactorDtype) -> None:
    matrix = random(6, 70)
    matrix[2] = 0
    packed = pack(matrix, kind)
    assert not unpack(packed, 70, kind, torch.float32)[2].any()
    assert torch.equal(packed[:4], pack(matrix[:4], kind))
    assert torch.equal(unpack(packed[:4], 70, kind, torch.float32), unpack(packed, 70, kind, torch.float32)[:4])


def test_a_budget_in_bytes_buys_several_times_the_rank() -> None:
    assert [bytes_per_value(kind) for kind in KINDS] == [2.0, 1.03125, 0.53125]
    assert [round(keep_ratio(0.15, kind, 4), 4) for kind in KINDS] == [0.15, 0.2909, 0.5647]
    assert (keep_ratio(0.15, None, 4), keep_ratio(0.3, "nf4", 4)) == (0.075, 1.0)


def gathered(W: torch.Tensor, X: torch.Tensor) -> Moments:
    if W.shape[0] >= W.shape[1]:
        gram = Gram(W.shape[1], CPU)
        gram.add(X)
        return Moments(gram, of_input=True)
    gram = Gram(W.shape[0], CPU)
    gram.add(X @ W.T)
    return Moments(gram, of_input=False, input_energy=X.square().sum(dim=0))


def error_of(W: torch.Tensor, E: torch.Tensor, X: torch.Tensor) -> float:
    return float((X @ (W - E).T).norm() / (X @ W.T).norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 96), (192, 64), (64, 192)], ids=["square", "tall", "wide"])
def test_errors_are_those_of_the_packed_pair_at_every_rank(shape: tuple[int, int], kind: FactorDtype) -> None:
    W = random(*shape) * torch.logspace(0, -1.5, shape[1], dtype=torch.float64)
    X = random(2000, shape[1], seed=1) * torch.logspace(0, -0.5, shape[1], dtype=torch.float64)
    moments, rank = gathered(W, X), 30
    factors = factorize(W, moments, rank, torch.float32)
    packed = pack_factors(W, moments, factors, kind, torch.float32)
    up = unpack(packed.up, shape[0], kind, torch.float32).double().T
    down = unpack(packed.down, shape[1], kind, torch.float32).double()
    for k in (1, 7, rank):
        wanted = error_of(W, up[:, :k] @ down[:k], X)
        assert float(packed.errors[k - 1]) == pytest.approx(wanted, rel=1e-6 if moments.of_input else 0.02)
    plain = (
        unpack(pack(factors.up.T, kind), shape[0], kind, torch.float32).double().T
        @ unpack(pack(factors.down, kind), shape[1], kind, torch.float32).double()
    )
    excess = float(packed.errors[-1]) ** 2 - factors.error**2
    naive = error_of(W, plain, X) ** 2 - factors.error**2
    if kind != "bf16":
        assert excess < (0.6 if moments.of_input else 0.95) * naive
    dense = pack_dense(W, moments, factors.energy, kind, torch.float32)
    wanted = error_of(W, unpack(dense.weight, shape[1], kind, torch.float32).double(), X)
    assert dense.error == pytest.approx(wanted, rel=1e-6 if moments.of_input else 0.05)


@pytest.mark.parametrize("shape", [(70, 70), (40, 100)], ids=["square", "wide"])
def test_inputs_that_span_little_give_finite_factors(shape: tuple[int, int]) -> None:
    W, X = random(*shape), random(5, shape[1], seed=2)
    X[:, 3] = 0
    moments = gathered(W, X)
    factors = factorize(W, moments, 20, torch.float32)
    packed = pack_factors(W, moments, factors, "nf4", torch.float32)
    up, down = (
        unpack(part, width, "nf4", torch.float32) for part, width in zip((packed.up, packed.down), shape, strict=True)
    )
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert up.norm(dim=1).max() < 3  # of unit columns; directions that were not seen stay what they were
    assert error_of(W, up.double().T @ down.double(), X) < 0.25


def test_the_spectrum_leaves_whole_what_is_worth_it() -> None:
    steep = [0.9**i for i in range(60)]
    flat = [1.0 - 0.001 * i for i in range(60)]
    spectra = {}
    for name, values in {"steep": steep, "flat": flat}.items():
        energy = sum(value * value for value in values) * 64 / 60
        errors = [max(0.0, 1 - sum(v * v for v in values[: k + 1]) / energy + 0.01) ** 0.5 for k in range(60)]
        spectra[name] = Spectrum(64, 64, values, energy, errors, 0.09)
    found = allocate_by_spectrum(spectra, 0.7)
    assert found["flat"] is None
    assert found["steep"] is not None
    assert 64 * 64 + found["steep"] * 128 <= 2 * 22 * 128
    assert allocate_by_spectrum(spectra, 1.0) == {"flat": None, "steep": None}
    tight = allocate_by_spectrum(spectra, 0.2)
    assert None not in tight.values()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), ratio=st.floats(0.1, 0.9))
def test_the_budget_of_the_spectrum_is_in_packed_bytes(data: st.DataObject, kind: FactorDtype, ratio: float) -> None:
    shapes, spectra = {}, {}
    for name in "abc":
        out_features, in_features = shapes[name] = (data.draw(st.integers(20, 150)), data.draw(st.integers(20, 150)))
        fall = data.draw(st.floats(0.8, 0.99))
        values = [fall**i for i in range(min(out_features, in_features) - 1)]
        energy = sum(value * value for value in values)
        left = [max(0.0, 1 - sum(v * v for v in values[: k + 1]) / energy) ** 0.5 for k in range(len(values))]
        spectra[name] = Spectrum(out_features, in_features, values, energy, left, 0.05, kind)
    uniform = {name: rank_for(ratio, *shape) for name, shape in shapes.items()}
    found = allocate_by_spectrum(spectra, ratio)
    stored, budget = (
        sum(linear_bytes(*shapes[name], rank, kind, 4) for name, rank in ranks.items()) for ranks in (found, uniform)
    )
    assert stored <= budget


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantise")
    save_tiny("qwen2", directory / "original", shards=2)
    tiny_tokenizer(directory / "original")
    (directory / "mix.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8))
    return directory


def compiled(root: Path, output: Path, **options: Any) -> Any:
    settings = {"max_length": 24, "samples": 12, **options}
    return compile_emulator(root / "original", root / "mix.jsonl", output, **settings)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_report_is_of_what_is_stored(root: Path, kind: FactorDtype | None, tmp_path: Path) -> None:
    result = compiled(root, tmp_path / "emulator", ratio=0.5, factor_dtype=kind)
    emulator, document = Emulator.open(tmp_path / "emulator"), read_json(tmp_path / "emulator/emulator.json")
    assert document["settings"]["factor_dtype"] == kind
    assert emulator.facts.packed == kind
    stored = sum(info.size_bytes for name, info in emulator.checkpoint.tensors.items() if ".lr_" in name)
    weights = sum(out * width for out, width in (emulator.shape(item.name) for item in result.linears))
    assert result.kept_bytes_share == pytest.approx(stored / (2 * weights), rel=1e-4)
    for item in result.linears:
        assert item.form == "factors"
        assert (item.unquantised_error is None) == (kind is None)
        if kind is not None:
            assert item.error >= item.unquantised_error * 0.999 >= 0.99 * item.optimal_error
    again = compiled(root, tmp_path / "again", ratio=0.5, factor_dtype=kind)
    assert emulator.digest == Emulator.open(again.output).digest


def test_at_the_top_of_the_scale_every_linear_is_quantised_whole(root: Path, tmp_path: Path) -> None:
    result = compiled(root, tmp_path / "emulator", keep_bytes=0.9, factor_dtype="nf4")
    assert {item.form for item in result.linears} == {"dense"}
    assert result.parameters_after == result.parameters_before
    facts = Emulator.open(tmp_path / "emulator").facts
    assert (facts.ranks, len(facts.quantized_dense)) == ({}, 14)
    assert all(0.05 < item.error < 0.13 for item in result.linears)
    with pytest.raises(InputError, match="whole weights"):
        slice_emulator(tmp_path / "emulator", 0.5, tmp_path / "slice")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_allocate_by_spectrum_keep_the_bytes_and_err_less(root: Path, kind: FactorDtype, tmp_path: Path) -> None:
    uniform = compiled(root, tmp_path / "uniform", ratio=0.6, factor_dtype=kind)
    spectrum = compiled(root, tmp_path / "spectrum", ratio=0.6, factor_dtype=kind, rank_allocation="spectrum")
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
    with pytest.raises(InputError, match=r"pip install 'onelayer\[quantised\]'"):
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
