"""Losses and gradients of logits that are formed by slices of a head."""

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


def gradient(dtype: torch.dtype, slice_rows: int, share: float, capped: bool) -> tuple[torch.Tensor, int]:
    """Return the gradient of a sum of losses, times `share` over their number, and how many rows were read."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::5] = IGNORED
    head = SlicedHead(dtype, slice_rows)
    formed = DeferredLogits.over(hidden, head, None).float()
    logits = torch.tanh(formed / 5) * 5 if capped else formed
    if share == 1:
        loss = torch.nn.functional.cross_entropy(logits, labels)
    else:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * share / (TOKENS * 4 // 5)
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad, head.rows_read


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("share", [1, 0.25, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_one_slice_is_read_once_for_the_same_gradient(
    dtype: torch.dtype, share: float, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean, and the mean over a power of two batches, to the bit; another scale to the rounding of the dtype."""
    at_once, read_at_once = gradient(dtype, VOCAB, share, capped)
    in_slices, _ = gradient(dtype, 16, share, capped)
    monkeypatch.setattr(token_loss._Waiting, "is_one_slice", False)
    in_turn, read_in_turn = gradient(dtype, VOCAB, share, capped)
    assert (read_at_once, read_in_turn) == (VOCAB, 2 * VOCAB)
    error = 4 * torch.finfo(dtype).eps * float(in_turn.abs().max())
    torch.testing.assert_close(in_slices, in_turn, rtol=0, atol=error)
    torch.testing.assert_close(at_once, in_turn, rtol=0, atol=0 if share != 0.3 else error)
