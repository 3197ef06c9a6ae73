"""Packed factors: their bytes, the errors that compile reports, and what a budget buys."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onelayer.compiler.factors.factorize import factorize
from onelayer.compiler.factors.moments import Gram, Moments
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.quantized_factors import quantize_dense, quantize_factors
from onelayer.compiler.factors.ranks import Spectrum, allocate_by_spectrum, rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype, bytes_per_value, keep_ratio, linear_bytes, row_bytes

FACTOR_DTYPES: tuple[FactorDtype, ...] = ("bf16", "int8", "nf4")
CPU = torch.device("cpu")
# QLoRA's levels (arXiv 2305.14314, appendix E), to four digits.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.723, 1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    factor_dtype=st.sampled_from(FACTOR_DTYPES),
    exponent=st.integers(-30, 30),
)
def test_quantized_rows_have_their_size_and_come_back_to_within_the_step(
    rows: int, width: int, factor_dtype: FactorDtype, exponent: int
) -> None:
    matrix = random(rows, width, seed=width) * 2.0**exponent
    quantized = quantize_matrix(matrix, factor_dtype)
    assert (quantized.shape, quantized.dtype) == ((rows, row_bytes(width, factor_dtype)), torch.uint8)
    found = dequantize_matrix(quantized, width, factor_dtype, torch.float32).double()
    assert found.shape == matrix.shape
    blocks = torch.nn.functional.pad(matrix.abs(), (0, -width % 64)).reshape(rows, -1, 64).amax(-1)
    largest = blocks.repeat_interleave(64, dim=1)[:, :width]
    step = {"bf16": matrix.abs() / 256, "int8": largest * (0.5 / 127 + 2**-8), "nf4": largest * (0.16 + 2**-8)}[
        factor_dtype
    ]
    assert ((found - matrix).abs() <= step).all()


def test_nf4_is_the_format_of_the_paper_and_int8_is_symmetric() -> None:
    matrix = random(3, 128)
    nf4 = dequantize_matrix(quantize_matrix(matrix, "nf4"), 128, "nf4", torch.float32).reshape(-1, 64)
    scales = matrix.reshape(-1, 64).abs().amax(1, keepdim=True).to(torch.bfloat16).float()
    levels = torch.tensor(NF4)
    nearest = (nf4 / scales)[:, :, None] - levels
    assert (nearest.abs().amin(-1) < 1e-4).all()
    ideal = levels[(matrix.reshape(-1, 64) / scales)[:, :, None].sub(levels).abs().argmin(-1)] * scales
    assert ((ideal - nf4).abs() > 1e-3 * scales).float().mean() < 0.01
    int8 = dequantize_matrix(quantize_matrix(-matrix, "int8"), 128, "int8", torch.float32)
    torch.testing.assert_close(int8, -dequantize_matrix(quantize_matrix(matrix, "int8"), 128, "int8", torch.float32))


@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
def test_zeros_stay_zeros_and_the_first_rows_are_the_quantized_first_rows(factor_dtype: FactorDtype) -> None:
    matrix = random(6, 70)
    matrix[2] = 0
    quantized = quantize_matrix(matrix, factor_dtype)
    assert not dequantize_matrix(quantized, 70, factor_dtype, torch.float32)[2].any()
    assert torch.equal(quantized[:4], quantize_matrix(matrix[:4], factor_dtype))
    assert torch.equal(
        dequantize_matrix(quantized[:4], 70, factor_dtype, torch.float32),
        dequantize_matrix(quantized, 70, factor_dtype, torch.float32)[:4],
    )


def test_a_budget_in_bytes_buys_several_times_the_rank() -> None:
    assert [bytes_per_value(factor_dtype) for factor_dtype in FACTOR_DTYPES] == [2.0, 1.03125, 0.53125]
    assert [round(keep_ratio(0.15, factor_dtype, 4), 4) for factor_dtype in FACTOR_DTYPES] == [0.15, 0.2909, 0.5647]
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


@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize("shape", [(96, 96), (192, 64), (64, 192)], ids=["square", "tall", "wide"])
def test_errors_are_those_of_the_quantized_pair_at_every_rank(
    shape: tuple[int, int], factor_dtype: FactorDtype
) -> None:
    W = random(*shape) * torch.logspace(0, -1.5, shape[1], dtype=torch.float64)
    X = random(2000, shape[1], seed=1) * torch.logspace(0, -0.5, shape[1], dtype=torch.float64)
    moments, rank = gathered(W, X), 30
    factors = factorize(W, moments, rank, torch.float32)
    quantized = quantize_factors(W, moments, factors, factor_dtype, torch.float32)
    up = dequantize_matrix(quantized.up, shape[0], factor_dtype, torch.float32).double().T
    down = dequantize_matrix(quantized.down, shape[1], factor_dtype, torch.float32).double()
    for k in (1, 7, rank):
        wanted = error_of(W, up[:, :k] @ down[:k], X)
        assert float(quantized.errors[k - 1]) == pytest.approx(wanted, rel=1e-6 if moments.of_input else 0.02)
    plain = (
        dequantize_matrix(quantize_matrix(factors.up.T, factor_dtype), shape[0], factor_dtype, torch.float32).double().T
        @ dequantize_matrix(quantize_matrix(factors.down, factor_dtype), shape[1], factor_dtype, torch.float32).double()
    )
    excess = float(quantized.errors[-1]) ** 2 - factors.figures.error**2
    naive = error_of(W, plain, X) ** 2 - factors.figures.error**2
    if factor_dtype != "bf16":
        assert excess < (0.6 if moments.of_input else 0.95) * naive
    dense = quantize_dense(W, moments, factors.figures.energy, factor_dtype, torch.float32)
    wanted = error_of(W, dequantize_matrix(dense.weight, shape[1], factor_dtype, torch.float32).double(), X)
    assert float(dense.error) == pytest.approx(wanted, rel=1e-6 if moments.of_input else 0.05)


@pytest.mark.parametrize("shape", [(70, 70), (40, 100)], ids=["square", "wide"])
def test_inputs_that_span_little_give_finite_factors(shape: tuple[int, int]) -> None:
    W, X = random(*shape), random(5, shape[1], seed=2)
    X[:, 3] = 0
    moments = gathered(W, X)
    factors = factorize(W, moments, 20, torch.float32)
    quantized = quantize_factors(W, moments, factors, "nf4", torch.float32)
    up, down = (
        dequantize_matrix(part, width, "nf4", torch.float32)
        for part, width in zip((quantized.up, quantized.down), shape, strict=True)
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


@settings(max_examples=40)
@given(data=st.data(), factor_dtype=st.sampled_from(FACTOR_DTYPES), ratio=st.floats(0.1, 0.9))
def test_the_budget_of_the_spectrum_is_in_quantized_bytes(
    data: st.DataObject, factor_dtype: FactorDtype, ratio: float
) -> None:
    shapes, spectra = {}, {}
    for name in "abc":
        out_features, in_features = shapes[name] = (data.draw(st.integers(20, 150)), data.draw(st.integers(20, 150)))
        fall = data.draw(st.floats(0.8, 0.99))
        values = [fall**i for i in range(min(out_features, in_features) - 1)]
        energy = sum(value * value for value in values)
        left = [max(0.0, 1 - sum(v * v for v in values[: k + 1]) / energy) ** 0.5 for k in range(len(values))]
        spectra[name] = Spectrum(out_features, in_features, values, energy, left, 0.05, factor_dtype)
    uniform = {name: rank_for(ratio, *shape) for name, shape in shapes.items()}
    found = allocate_by_spectrum(spectra, ratio)
    stored, budget = (
        sum(linear_bytes(*shapes[name], rank, factor_dtype, 4) for name, rank in ranks.items())
        for ranks in (found, uniform)
    )
    assert stored <= budget


def test_unpacking_sets_no_log_level_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, levels = quantize_matrix(torch.ones(2, 64), "nf4"), list[int]()
    monkeypatch.setattr(logging.Logger, "setLevel", lambda self, level: levels.append(level))
    dequantize_matrix(quantized, 64, "nf4", torch.float32)
    assert not levels
