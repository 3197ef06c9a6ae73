"""The hidden states in what a unit returns: read, or replaced. A layer may have two, of a text and of a picture."""

from collections.abc import Mapping
from typing import Any

import torch

from onelayer.compiler.errors import InputError


def hidden_states(unit: str, output: Any) -> dict[int, torch.Tensor]:
    """Return the floating tensors among the outputs of the unit named `unit`, by their number in a tuple or list.

    Raises `InputError` if the unit returns none.
    """
    outputs = output if isinstance(output, tuple | list) else [output]
    found = {
        number: value
        for number, value in enumerate(outputs)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not found:
        raise InputError(f"{unit}: returns {type(output).__name__}, which has no offset; train without anchors")
    return found


def with_hidden_states(output: Any, states: Mapping[int, torch.Tensor]) -> Any:
    """Return what a unit returned, with other hidden states at some numbers."""
    if not isinstance(output, tuple | list):
        return states.get(0, output)
    return type(output)(states.get(number, value) for number, value in enumerate(output))
