"""Codes: feedback helps, few rows are trusted less, and unpacking returns what was packed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from onelayer.compiler.codes import forms, product
from onelayer.compiler.codes.encode import Coded, decode, decode_with, encode, unpacked
from onelayer.compiler.codes.forms import (
    CODE_SHAPES,
    CodeShape,
    code_row_bytes,
    codebook_bytes,
    fitting_codes,
    group_size,
)
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.codes.product import coded_product
from onelayer.compiler.codes.residual import Sides, product_of, residual_factors
from onelayer.compiler.codes.windows import windows
from onelayer.compiler.factors.moments import OutputWeights, times_blocks


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    x: torch.Tensor = torch.randn(rows, features, generator=generator) @ mixing
    return x


def gram(x: torch.Tensor) -> torch.Tensor:
    found = BlockGram(x.shape[1], x.device)
    found.add(x)
    return found.blocks


BYTES = CodeShape(4, 8)  # one state: no window overlaps another
NIBBLES = CodeShape(2, 4)


@pytest.mark.parametrize("shape", [*CODE_SHAPES, BYTES])
def test_codes_take_the_bytes_that_are_stated_and_read_back(shape: CodeShape) -> None:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(1))
    coded = encode(W, gram(correlated(200, 50)), shape)
    rows, codebook = coded.packed()
    assert rows.shape == (24, code_row_bytes(50, shape))
    assert codebook.numel() == codebook_bytes(shape)
    again = unpacked(rows, codebook, 50, shape.bits)
    assert torch.equal(decode(again, 50, torch.float32), decode(coded, 50, torch.float32))


def test_feedback_is_better_than_coding_without_it() -> None:
    x = correlated(400, 64)
    for seed in range(3):
        W = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        errors = []
        for moments in (gram(x), torch.eye(64, dtype=torch.float64)[None]):
            kept = decode(encode(W, moments, NIBBLES), 64, torch.float32)
            errors.append((x @ (W - kept).T).square().sum())
        assert errors[0] < 0.95 * errors[1]


def test_windows_that_overlap_lose_less_than_bytes_at_equal_bits() -> None:
    x = correlated(400, 96)
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    errors = [
        (x @ (W - decode(encode(W, gram(x), shape), 96, torch.float32)).T).square().sum() for shape in (NIBBLES, BYTES)
    ]
    assert errors[0] < 0.88 * errors[1]


def test_few_rows_of_calibration_are_trusted_less() -> None:
    few, others = correlated(450, 64).split([50, 400])
    for seed in range(3):
        W = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        errors = [
            float((others @ (W - decode(encode(W, gram(few), NIBBLES, rows), 64, torch.float32)).T).square().sum())
            for rows in (len(few), math.inf)
        ]
        assert errors[0] < 0.8 * errors[1]


def test_a_row_of_zeros_stays_near_zero() -> None:
    W = torch.zeros(2, 16)
    assert decode(encode(W, gram(correlated(50, 16)), NIBBLES), 16, torch.float32).abs().max() < 1e-30


def test_long_rows_are_split_into_groups_of_whole_codes() -> None:
    assert group_size(4096) == 4096
    for features in (4097, 8192, 14336, 28672):
        size = group_size(features)
        assert size <= 4096
        assert all(size % shape.width == 0 for shape in CODE_SHAPES)


def test_the_finest_codes_that_leave_room_are_chosen() -> None:
    shares = {0.25: 3.5, 0.2: 3, 0.17: 2.5, 0.145: 2, 0.12: 5 / 3, 0.105: 1.5, 0.1: 4 / 3, 0.08: 1, 0.07: None}
    for share, bits in shares.items():
        coded = fitting_codes({"q": (4096, 4096), "k": (1024, 4096)}, share)
        assert bits == (coded and coded[0].bits / coded[0].width)


def test_small_linears_get_coarser_codes_until_factors_fit() -> None:
    shapes = {"q": (192, 192), "k": (48, 192)}
    assert fitting_codes(shapes, 0.25) == (CodeShape(2, 7), {"q": 2, "k": None})
    assert fitting_codes(shapes, 0.2) == (CodeShape(2, 5), {"q": 4, "k": 1})
    assert fitting_codes(shapes, 0.145) == (CodeShape(2, 3), {"q": 7, "k": 2})
    assert fitting_codes({"q": (96, 96)}, 0.145) is None


def test_residual_factors_are_near_the_optimum_under_both_sides() -> None:
    x, g = correlated(500, 48, 3), correlated(500, 40, 4)
    R = torch.randn(40, 48, generator=torch.Generator().manual_seed(5))
    sides = replace(Sides.of_inputs(gram(x)), outputs=OutputWeights.of(gram(g), 40))
    kept = product_of(*residual_factors(R, sides, 6, torch.float32, 0), (40, 48), torch.float32)
    singular = torch.linalg.svdvals(times_blocks(sides.weighted(R), sides.S))
    optimum = float(singular[6:].square().sum())
    assert optimum <= sides.energy(R - kept)[1] < 1.1 * optimum
    plain = residual_factors(R, Sides.of_inputs(gram(x)), 6, torch.float32, 0)
    other = product_of(*plain, (40, 48), torch.float32)
    assert sides.energy(R - kept)[1] < sides.energy(R - other)[1]


def test_rows_that_are_not_finite_are_left_out() -> None:
    x = correlated(60, 16)
    broken = torch.cat([x, torch.full((1, 16), torch.nan)])
    found = BlockGram(16, x.device)
    found.add(broken)
    assert (found.rows, found.dropped_rows) == (61, 1)
    torch.testing.assert_close(found.blocks, gram(x))


@pytest.mark.parametrize("shape", [CodeShape(3, 5), NIBBLES, BYTES])
def test_gradients_of_a_product_are_those_of_the_decoded_weight(shape: CodeShape) -> None:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(6))
    coded = encode(W, gram(correlated(200, 50)), shape)
    wanted = [part.float().requires_grad_() for part in (correlated(7, 50, 8), coded.codebook, coded.scales)]
    found = [part.detach().clone().requires_grad_() for part in wanted]
    values = wanted[1][windows(coded.codes, shape.bits, -(-50 // shape.width)).long()].reshape(24, -1)[:, :50]
    (wanted[0] @ (values * wanted[2]).T).square().sum().backward()
    x, codebook, scales = found
    coded_product(x, Coded(coded.codes, scales, codebook, shape.bits), 50).square().sum().backward()
    for part, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(part.grad, exact.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [CodeShape(3, 5), CodeShape(3, 8)])
@pytest.mark.parametrize("at_once", [1, 100, 720])
@pytest.mark.parametrize("longest_group", [4096, 30])
def test_a_product_decodes_some_values_at_a_time(
    at_once: int, longest_group: int, shape: CodeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "LONGEST_GROUP", longest_group)
    monkeypatch.setattr(forms, "GROUP_STEP", 15)
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(6))
    coded = encode(W, torch.eye(forms.group_size(50)).expand(-(-50 // forms.group_size(50)), -1, -1), shape)
    weight = decode(coded, 50, torch.float64)
    assert coded.scales.shape[1] == (1 if longest_group > 50 else 4)
    assert (W - weight).square().mean() < 0.35 * W.square().mean()
    monkeypatch.setattr(forms, "DECODED_VALUES", at_once)
    decoded: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        found = decode_with(*arguments)
        decoded.append(found.numel())
        return found

    monkeypatch.setattr(product, "decode_with", counted)
    x = correlated(7, 50, 8).double().requires_grad_()
    used = replace(coded, codebook=coded.codebook.double(), scales=coded.scales.double())
    y = coded_product(x, used, 50)
    y.square().sum().backward()
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)
    assert sum(decoded) == 2 * 24 * 50
    assert max(decoded) <= max(at_once, 3 * 24)
