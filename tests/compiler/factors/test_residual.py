"""Residuals of factors in a few bits: errors as in theory, any width, zeros, outliers, precisions, sizes."""

import pytest
import torch

from helpers.spectra import generator, spectral
from onelayer.compiler.factors.activation_factors import ActivationFactors, compress, quantize_residual
from onelayer.compiler.factors.stored_forms import RESIDUAL_BITS, factored_bytes

BITS = (1, 2, 4)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(5))


def rebuilt(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize_residual(matrix.clone(), bits).add_to(torch.zeros_like(matrix))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# Distortions of the uniform quantizers of a normal variable in Max's table.
@pytest.mark.parametrize(("bits", "lost"), [(1, 0.3634), (2, 0.1188), (4, 0.01154)])
def test_as_little_is_lost_as_theory_says(bits: int, lost: float) -> None:
    matrix = normal(512, 256)
    assert relative(rebuilt(matrix, bits), matrix) ** 2 == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 3, 8, 13, 64])
def test_every_value_goes_to_the_nearest_level_of_its_own_scales(bits: int, columns: int) -> None:
    matrix = normal(40, columns)
    packed = quantize_residual(matrix.clone(), bits)
    assert packed.codes_tm.shape == (40, -(-columns * bits // 8))
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    grid = packed.scale_t1.float()[:, :, None] * packed.scale_n.float()[None, :, None] * levels
    nearest = grid.gather(2, (grid - matrix[:, :, None]).abs().argmin(2, keepdim=True)).squeeze(2)
    torch.testing.assert_close(packed.add_to(torch.zeros_like(matrix)), nearest)


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_and_columns_stay_zero(bits: int) -> None:
    matrix = normal(32, 24)
    matrix[::3] = 0
    matrix[:, ::4] = 0
    found = rebuilt(matrix, bits)
    assert not found[::3].any()
    assert not found[:, ::4].any()
    assert relative(found, matrix) < 0.7
    assert not rebuilt(torch.zeros(8, 8), bits).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_massive_row_and_column_take_nothing_from_the_others(bits: int) -> None:
    matrix = normal(256, 64)
    usual = relative(rebuilt(matrix, bits), matrix)
    massive = matrix.clone()
    massive[17] *= 1e4 * torch.arange(1, 65)  # with a profile of its own
    massive[:, 5] *= 1e4
    others = (torch.arange(256) != 17)[:, None] & (torch.arange(64) != 5)
    found = rebuilt(massive, bits)
    assert relative(found[others], matrix[others]) < 1.1 * usual
    rest = torch.arange(256) != 17
    assert relative(found[rest, 5], massive[rest, 5]) < 0.9


def test_every_bit_counts_and_is_counted() -> None:
    matrix = spectral(256, 100, 0.5)
    errors = []
    for bits in (0, *BITS):
        factors = compress(matrix, 12, generator(), residual_bits=bits)
        assert isinstance(factors, ActivationFactors)
        assert factors.saved_bytes == factored_bytes(256, 100, 12, bits)
        errors.append(relative(factors.rebuild(), matrix))
    for error, lost in zip(errors[1:], (0.3634, 0.1188, 0.01154), strict=True):
        assert error / errors[0] == pytest.approx(lost**0.5, rel=0.1)
    assert compress(matrix, 12, generator()).saved_bytes == factored_bytes(256, 100, 12, RESIDUAL_BITS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    matrix = spectral(256, 64, 0.5)
    expected = relative(compress(matrix, 8, generator()).rebuild(), matrix)
    found = compress(matrix.to(dtype), 8, generator()).rebuild()
    assert found.dtype == dtype
    assert relative(found, matrix) == pytest.approx(expected, rel=0.05)


def test_the_rounding_of_the_factors_is_made_good_too() -> None:
    matrix = spectral(256, 64, 1.0)
    matrix[:, 8:] = 0
    bare, with_residual = (compress(matrix, 8, generator(), residual_bits=bits).rebuild() for bits in (0, 2))
    assert relative(with_residual, matrix) < 0.5 * relative(bare, matrix)
