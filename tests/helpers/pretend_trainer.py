"""Lets Trainer compute on the pretend device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.training_args
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]

from onelayer.compiler.machine import devices


def let_trainer_use(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers and accelerate, which know real devices only, take this one."""
    PartialState._reset_state()
    AcceleratorState._reset_state()
    chosen = torch.device(device)
    arguments = transformers.training_args.TrainingArguments
    known: Callable[[Any], Any] = arguments.device.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(arguments, "device", property(lambda self: (known(self), chosen)[1]))
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: chosen))
    monkeypatch.setattr(devices, "pick_device", lambda name: chosen)
