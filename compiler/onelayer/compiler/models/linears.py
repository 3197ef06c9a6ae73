"""The linears of a unit, and how many values a unit computes for one token, from shapes alone."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.models.experts import ExpertStacks, stacks_below
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import comparing_bytes, head_bytes, routed_width
from onelayer.compiler.models.units import Unit


def unit_width(streamed: StreamedModel, unit: Unit) -> int:
    """Count inputs and outputs of all matrices of a unit; experts count once for each that a token is sent to."""
    experts = list(stacks_below(unit.name, unit.module))
    stacked = {path for stacks in experts for path in stacks.paths}
    names = (name for name in unit.held_names if name not in stacked)
    shapes = (streamed.weights.bare_parameters[name].shape for name in names)
    return sum(sum(shape[-2:]) for shape in shapes if len(shape) >= 2) + sum(map(expert_width, experts))


def expert_width(stacks: ExpertStacks) -> int:
    """Count the inputs and outputs of one module of experts for one token."""
    (_, opened, hidden), (_, _, inner) = (stacks.shape(leaf) for leaf in stacks.leaves)
    return routed_width(stacks.per_token, opened, inner, hidden)


def widest(streamed: StreamedModel) -> int:
    """Return the width of the widest unit."""
    return max(unit_width(streamed, unit) for unit in streamed.units)


def head_workspace(streamed: StreamedModel, tokens: int, *, compared: bool = False) -> int:
    """Predict what reading the head by slices holds for the logits of `tokens`; see `head_bytes`.

    With `compared`, two models' logits are.
    """
    if streamed.head is None:  # its logits, if it has any, are formed in a unit
        return 0
    vocabulary, hidden = weight_shape(streamed.head)
    head = head_bytes(vocabulary, hidden, streamed.dtype.itemsize, tokens)
    return head + (comparing_bytes(vocabulary, tokens) if compared else 0)


def unit_linears(unit: Unit) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears of a unit with their runtime module names."""
    for name, module in unit.module.named_modules():
        if is_linear(module):
            yield (f"{unit.name}.{name}" if name else unit.name), module


def stack_shapes(streamed: StreamedModel) -> dict[str, tuple[int, int, int]]:
    """Map the runtime name of every stack of experts in the repeated layers to its shape (E, out, in)."""
    return {
        stacks.path(leaf): stacks.shape(leaf)
        for unit in streamed.units
        if unit.is_block
        for stacks in stacks_below(unit.name, unit.module)
        for leaf in stacks.leaves
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module has the weight of a linear: `nn.Linear`, or GPT-2's `Conv1D`, or a subclass of theirs."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear; `Conv1D` stores its weight transposed."""
    assert isinstance(linear.weight, torch.Tensor)
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) of a linear; `Conv1D` stores its weight transposed."""
    assert isinstance(linear.weight, torch.Tensor)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight
