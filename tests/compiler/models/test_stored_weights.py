"""Parameters of a checkpoint: made by the library, which is asked once for those that are stored unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import save_tiny
from onelayer.compiler.models.streamed_model import StreamedModel


@pytest.mark.parametrize(
    ("name", "dtype", "asked_again"),
    [
        ("llama_tied", torch.bfloat16, False),
        ("t5", torch.float16, False),  # some of its linears compute in float32
        ("mixtral", torch.float32, True),  # experts are stored one by one
    ],
)
def test_the_library_is_asked_once_for_what_is_stored_unchanged(
    name: str, dtype: torch.dtype, asked_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(name, tmp_path, dtype)
    streamed = StreamedModel(tmp_path)
    weights, calls = streamed.weights, list[int]()
    units = [unit.held_names for unit in streamed.units if unit.is_block]
    first = [weights.load(names) for names in units]
    convert = weights._conversion.convert

    def counted(stored: dict[str, Any]) -> None:
        calls.append(len(stored))
        convert(stored)

    monkeypatch.setattr(weights._conversion, "convert", counted)
    again = [weights.load(names) for names in units]
    assert len(calls) == (len(units) if asked_again else 0)
    for found, expected in zip(again, first, strict=True):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key
    if name == "t5":
        assert {tensor.dtype for made in first for tensor in made.values()} == {torch.float16, torch.float32}
