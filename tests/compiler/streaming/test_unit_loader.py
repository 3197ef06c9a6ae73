"""A unit that is read ahead but never requested must not stop the reading ahead of others."""

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import save_tiny
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.unit_loader import UnitLoader


def test_what_was_read_ahead_and_not_asked_for_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("mistral", tmp_path)
    streamed = StreamedModel(tmp_path)
    readers: dict[str, str] = {}
    real = streamed.weights.read

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = tuple(names)
        readers[names[0]] = threading.current_thread().name
        return real(names)

    monkeypatch.setattr(streamed.weights, "read", read)
    first, second, third = (unit for unit in streamed.units if unit.is_block)
    with UnitLoader(streamed, torch.device("cpu")) as loader:
        loader.read_ahead(second)
        loader.forget_ahead()
        loader.read_ahead(third)
        for unit in (first, third):
            with loader.hold(unit):
                pass
    assert not readers[first.parameters[0]].startswith("read-ahead")
    assert readers[third.parameters[0]].startswith("read-ahead")
