"""Codes: each is the nearest at its turn, feedback helps, and unpacking returns what was packed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from onelayer.compiler.codes import forms, product
from onelayer.compiler.codes.codebook import normal_codebook
from onelayer.compiler.codes.encode import decode, decode_with, encode, nearest, unpacked
from onelayer.compiler.codes.forms import CODE_WIDTHS, CodeWidth, code_row_bytes, code_width, codebook_bytes, group_size
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.codes.product import coded_product
from onelayer.compiler.codes.residual import Sides, product_of, residual_factors
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


@pytest.mark.parametrize("width", CODE_WIDTHS)
def test_codes_take_the_bytes_that_are_stated_and_read_back(width: CodeWidth) -> None:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(1))
    coded = encode(W, gram(correlated(200, 50)), width)
    rows, codebook = coded.packed()
    assert rows.shape == (24, code_row_bytes(50, width))
    assert codebook.numel() == codebook_bytes(width)
    again = unpacked(rows, codebook, 50)
    assert torch.equal(decode(again, 50, torch.float32), decode(coded, 50, torch.float32))


def test_without_correlation_every_code_is_the_nearest() -> None:
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    coded = encode(W, torch.eye(32, dtype=torch.float64)[None], 4)
    points = (W / coded.scales.float()).reshape(-1, 4)
    distances = torch.cdist(points.double(), normal_codebook(4).double())
    assert torch.equal(distances.argmin(dim=1), coded.codes.reshape(-1).long())


def test_feedback_is_better_than_rounding_each_by_itself() -> None:
    x = correlated(400, 64)
    for seed in range(3):
        W = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        coded = encode(W, gram(x), 4)
        alone = nearest((W / coded.scales.float()).reshape(-1, 4), normal_codebook(4))
        rounded = normal_codebook(4)[alone].reshape(32, 64) * coded.scales.float()
        with_feedback = (x @ (W - decode(coded, 64, torch.float32)).T).square().sum()
        assert with_feedback < 0.95 * (x @ (W - rounded).T).square().sum()


def test_few_rows_of_calibration_are_trusted_less() -> None:
    few, others = correlated(450, 64).split([50, 400])
    for seed in range(3):
        W = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        errors = [
            float((others @ (W - decode(encode(W, gram(few), 4, rows), 64, torch.float32)).T).square().sum())
            for rows in (len(few), math.inf)
        ]
        assert errors[0] < 0.8 * errors[1]


def test_a_row_of_zeros_stays_near_zero() -> None:
    W = torch.zeros(2, 16)
    assert decode(encode(W, gram(correlated(50, 16)), 4), 16, torch.float32).abs().max() < 1e-30


def test_long_rows_are_split_into_groups_of_whole_codes() -> None:
    assert group_size(4096) == 4096
    for features in (4097, 8192, 14336, 28672):
        size = group_size(features)
        assert size <= 4096
        assert all(size % width == 0 for width in CODE_WIDTHS)


def test_the_finest_codes_that_leave_room_are_chosen() -> None:
    shares = {0.25: 3, 0.2: 3, 0.145: 4, 0.12: 5, 0.1: 6, 0.08: 8, 0.07: None}
    assert {share: code_width(share) for share in shares} == shares


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


def test_gradients_of_a_product_are_those_of_the_decoded_weight() -> None:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(6))
    coded = encode(W, gram(correlated(200, 50)), 3)
    wanted = [part.float().requires_grad_() for part in (correlated(7, 50, 8), coded.codebook, coded.scales)]
    found = [part.detach().clone().requires_grad_() for part in wanted]
    values = wanted[1][coded.codes.long()].reshape(24, -1)[:, :50] * wanted[2]
    (wanted[0] @ values.T).square().sum().backward()
    x, codebook, scales = found
    coded_product(x, coded.codes, codebook, scales, 50).square().sum().backward()
    for part, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(part.grad, exact.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 100, 720])
@pytest.mark.parametrize("longest_group", [4096, 30])
def test_a_product_decodes_some_values_at_a_time(
    at_once: int, longest_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "LONGEST_GROUP", longest_group)
    monkeypatch.setattr(forms, "GROUP_STEP", 15)
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(6))
    coded = encode(W, torch.eye(forms.group_size(50)).expand(-(-50 // forms.group_size(50)), -1, -1), 3)
    weight = decode(coded, 50, torch.float64)
    assert coded.scales.shape[1] == (1 if longest_group > 50 else 4)
    monkeypatch.setattr(forms, "DECODED_VALUES", at_once)
    decoded: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        found = decode_with(*arguments)
        decoded.append(found.numel())
        return found

    monkeypatch.setattr(product, "decode_with", counted)
    x = correlated(7, 50, 8).double().requires_grad_()
    y = coded_product(x, coded.codes, coded.codebook.double(), coded.scales.double(), 50)
    y.square().sum().backward()
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)
    assert sum(decoded) == 2 * 24 * 50
    assert max(decoded) <= max(at_once, 3 * 24)
