"""The hidden state in what a unit returns: read, or replaced."""

from typing import Any

import torch

from onelayer.compiler.errors import InputError


def hidden_state(unit: str, output: Any) -> torch.Tensor:
    """Return the hidden state among the outputs of the unit named `unit`: the output itself, or the first of a tuple.

    Raises `InputError` if the unit returns something else.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise InputError(f"{unit}: returns {type(output).__name__}, which has no offset; train without anchors")
    return first


def with_hidden_state(output: Any, hidden: torch.Tensor) -> Any:
    """Return what a unit returned, with another hidden state."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden
