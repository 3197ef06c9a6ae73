"""Losses and gradients of logits that are formed by slices of a head."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from onelayer.compiler.data.tokens import IGNORED
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.streaming import token_loss

TOKENS, WIDTH, VOCAB = 40, 24, 50


class SlicedHead:
    """A head in memory that counts how often its rows are read."""

    shape = torch.Size((VOCAB, WIDTH))

    def __init__(self, dtype: torch.dtype, slice_rows: int) -> None:
        self.weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.slice_rows = slice_rows
        self.rows_read = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows."""
        self.rows_read += stop - start
        return self.weight[start:stop]

    def row_slices(self) -> Iterator[tuple[int, int]]:
        """Return the bounds of the slices."""
        return ((start, min(start + self.slice_rows, VOCAB)) for start in range(0, VOCAB, self.slice_rows))


def gradient(
    dtype: torch.dtype, slice_rows: int, share: float, capped: bool, ignored: bool = True
) -> tuple[torch.Tensor, int]:
    """Return the gradient of a sum of losses, times `share` over their number, and how many rows were read.

    Without slices, logits are formed as a whole.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    if ignored:
        labels[::5] = IGNORED
    head = SlicedHead(dtype, slice_rows)
    formed = DeferredLogits.over(hidden, head, None) if slice_rows else torch.nn.functional.linear(hidden, head.weight)
    logits = torch.tanh(formed.float() / 5) * 5 if capped else formed.float()
    if share == 1:
        loss = torch.nn.functional.cross_entropy(logits, labels)
    else:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * share / (labels != IGNORED).sum()
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad, head.rows_read


CASES = pytest.mark.parametrize(
    ("dtype", "share", "capped"),
    list(itertools.product([torch.float32, torch.bfloat16], [1, 0.25, 0.3], [False, True])),
)


@CASES
def test_a_head_of_one_slice_gives_the_bits_of_the_resident_gradient(
    dtype: torch.dtype, share: float, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the mean, and the mean over a power of two batches; for another scale up to the rounding of the dtype."""
    monkeypatch.setattr(token_loss, "LOGITS_COPIES", 100)  # all in one piece, as the resident logits
    found, rows_read = gradient(dtype, VOCAB, share, capped, ignored=False)
    expected, _ = gradient(dtype, 0, share, capped, ignored=False)
    error = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert rows_read == VOCAB
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if share != 0.3 else error)


@CASES
def test_slices_give_the_gradient_of_the_whole(dtype: torch.dtype, share: float, capped: bool) -> None:
    whole, _ = gradient(dtype, VOCAB, share, capped)
    in_slices, rows_read = gradient(dtype, 16, share, capped)
    assert rows_read == 2 * VOCAB
    error = 4 * torch.finfo(dtype).eps * float(whole.abs().max())
    torch.testing.assert_close(in_slices, whole, rtol=0, atol=error)
