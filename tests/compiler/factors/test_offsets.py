"""Stored offsets: what coding loses, and what it must not lose."""

import pytest
import torch

from onelayer.compiler.factors.offsets import code_offset

SHAPE = (3, 50, 66)  # 66 features fill no whole byte with 1 bit a value


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def loss(offset: torch.Tensor, bits: int) -> float:
    """Compute the share of the square that is lost."""
    rebuilt = code_offset(offset.clone(), bits).rebuild()
    return float((rebuilt - offset).square().sum() / offset.square().sum())


@pytest.mark.parametrize(("bits", "wanted"), [(1, 0.363), (2, 0.119), (4, 0.012), (32, 0.0)])
def test_the_loss_is_that_of_the_best_even_levels(bits: int, wanted: float) -> None:
    assert loss(noise(), bits) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_massive_tokens_and_features_do_not_blur_the_others(bits: int) -> None:
    offset = noise()
    offset[:, 7] *= 1000
    offset[..., 5] *= 300
    others = torch.ones(SHAPE, dtype=torch.bool)
    others[:, 7] = False
    others[..., 5] = False
    rebuilt = code_offset(offset.clone(), bits).rebuild()
    lost = float((rebuilt - offset)[others].square().sum() / offset[others].square().sum())
    assert lost == pytest.approx(loss(noise(), bits), rel=0.15)


@pytest.mark.parametrize("bits", [1, 2, 4, 32])
def test_zero_stays_zero_and_tokens_without_an_offset_too(bits: int) -> None:
    offset = noise()
    offset[1, 20:] = 0
    assert torch.equal(code_offset(torch.zeros(SHAPE), bits).rebuild(), torch.zeros(SHAPE))
    assert code_offset(offset.clone(), bits).rebuild()[1, 20:].count_nonzero() == 0


def test_stored_bytes_are_two_bits_a_value_and_the_scales() -> None:
    coded = code_offset(noise(), 2)
    tokens, features = SHAPE[0] * SHAPE[1], SHAPE[2]
    assert coded.stored_bytes == tokens * -(-features // 4) + 2 * (tokens + features)
    assert sum(tensor.nbytes for tensor in coded.tensors) == coded.stored_bytes
    assert torch.equal(coded.to(torch.device("cpu")).rebuild(), coded.rebuild())
