"""Adapters that add what they compute to the output of their linear in place, where no gradient is wanted.

PEFT makes three more tensors of the output's size for each adapted linear: scaled, added, and cast back. On a CPU these
took longer than the linear itself (manifests/LOG.md). Of PEFT's semi-private surface this relies on `lora_variant`, by
which a layer replaces that sum alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class _InPlace:
    """A variant of a LoRA layer: the same sum, rounded once to the dtype of the output."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **further: Any
    ) -> torch.Tensor:
        """Add what an adapter makes of x (..., in) to result (..., out), which the layer's linear has just made."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result.add_(module.lora_B[active_adapter](low), alpha=module.scaling[active_adapter])


@contextmanager
def added_in_place(*models: nn.Module) -> Iterator[None]:
    """Let the plain LoRA linears of some models add in place inside `with`; nothing there may need a gradient."""
    layers: list[Any] = [module for model in models for module in model.modules() if type(module) is Linear]
    plain = [(layer, name) for layer in layers for name in layer.lora_A if name not in layer.lora_variant]
    for layer, name in plain:
        layer.lora_variant[name] = _InPlace
    try:
        yield
    finally:
        for layer, name in plain:
            del layer.lora_variant[name]
