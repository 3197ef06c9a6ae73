"""Stand-ins inside a model's own code: supported operations equal the real tensor's, others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.lazy_tensors import AbsentWeight, DiskMatrix
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.safetensors_writer import tensor_entry, write_safetensors

CPU = torch.device("cpu")
TOKENS, WIDTH = 23, 6


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskMatrix:
    """A head (TOKENS, WIDTH) on disk that is read seven rows at a time."""
    monkeypatch.setattr("onelayer.compiler.models.lazy_tensors.SLICE_BYTES", 7 * WIDTH * 4)
    weight = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    write_safetensors(tmp_path / "model.safetensors", [tensor_entry("head", weight)])
    (tmp_path / "config.json").write_text("{}")
    return DiskMatrix.over(Checkpoint.open(tmp_path), "head", torch.float32, CPU, is_head=True)


def logits_of(head: DiskMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same logits twice: deferred, and formed."""
    hidden = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.linear(hidden, head), hidden @ head.read(0, TOKENS).T


@pytest.mark.parametrize(
    "key",
    [
        (slice(None), slice(None), [1, 5, 22]),
        (..., torch.tensor([0, 8, 9])),
        (slice(None), slice(None), slice(4, 16)),
        (..., 7),
    ],
    ids=str,
)
def test_values_set_for_some_tokens_stay_set(head: DiskMatrix, key: Any) -> None:
    deferred, formed = logits_of(head)
    for logits in (deferred, formed):
        logits *= 2
        logits[key] = -9.0
        logits.div_(3)
    assert isinstance(deferred, DeferredLogits)
    torch.testing.assert_close(deferred.materialize(), formed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda logits: logits.__setitem__((0, slice(None), [1]), 0.0),
        lambda logits: logits.__setitem__((..., [1]), torch.ones(2, 3, 1)),
        lambda logits: logits.fill_(0.0),
        lambda logits: logits.add_(torch.ones(TOKENS)),
    ],
)
def test_other_changes_in_place_are_refused_and_not_lost(head: DiskMatrix, edit: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="changes logits that are not formed yet"):
        edit(logits_of(head)[0])
    deferred, formed = logits_of(head)
    deferred += torch.arange(TOKENS)
    torch.testing.assert_close(deferred, formed + torch.arange(TOKENS))


def test_an_absent_weight_can_be_read_but_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight = AbsentWeight.like(torch.empty(3, 4, device="meta"), "w", lambda _: values)
    x = torch.ones(2, 3)
    assert torch.equal(x @ weight, x @ values)
    assert torch.equal(weight.t()[1], values[:, 1])
    torch.testing.assert_close(torch.nn.functional.linear(torch.ones(4), weight), values.sum(dim=1))
    assert (weight.device, weight.shape) == (CPU, (3, 4))
    for change in (lambda: weight.div_(2), lambda: weight.__setitem__(0, 1.0), lambda: weight.data):
        with pytest.raises(TypeError, match="needs the values of a weight outside its unit"):
            change()
    monkeypatch.setattr("onelayer.compiler.models.lazy_tensors.SLICE_BYTES", 3 * 4 * 4 - 1)
    with pytest.raises(TypeError):
        x @ weight


def test_rows_asked_for_twice_in_a_row_are_read_once(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", [tensor_entry("table", torch.arange(40.0).reshape(10, 4))])
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    table = DiskMatrix.over(checkpoint, "table", torch.float32, CPU)
    for ids, read in (([7, 2, 7], 2), ([7, 2, 7], 2), ([2, 7], 2), ([1], 3), ([7, 2], 5)):
        found = torch.nn.functional.embedding(torch.tensor(ids), table)
        assert found[:, 0].tolist() == [4.0 * row for row in ids]
        assert checkpoint.bytes_read == read * 4 * 4
        found.zero_()  # what a model does to its own copy is its own business
