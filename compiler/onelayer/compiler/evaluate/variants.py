"""Runs one resident unit of the original as several models: alone, with an adapter, or as its emulator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onelayer.compiler.adapters.attach import Adapted, adapted_model, tuner_layers
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_values
from onelayer.compiler.data.classes import Classes, predicted_classes
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.models.experts import ExpertStacks, expert_stacks
from onelayer.compiler.models.linears import is_linear, weight_of
from onelayer.compiler.models.units import Forward, Unit, named_parts, replaced_forwards

Run = Callable[[int, Any, Any], Any]


@dataclass(frozen=True)
class Variant:
    """A way to run a unit: with the named adapter, or with an emulator's factors as weights; the original if neither.

    An emulator differs from its original only in these factors, so it needs no model of its own.
    """

    adapter: str | None = None
    emulator: Emulator | None = None


def switch_variants(adapted: Adapted, variants: Sequence[Variant], device: torch.device) -> Callable[[Unit], Any]:
    """Run each unit as the variant of the current batch: stream index i is variant i % n."""

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[Run]:
        layers = tuner_layers(unit)
        emulators = {item.emulator.directory: item.emulator for item in variants if item.emulator is not None}
        replaced = {directory: _emulated(unit, emulator, device) for directory, emulator in emulators.items()}

        def run(index: int, args: Any, kwargs: Any) -> Any:
            variant = variants[index % len(variants)]
            put_values(variant.adapter)
            for layer in layers:
                layer.enable_adapters(variant.adapter is not None)
                if variant.adapter is not None:
                    layer.set_adapter([variant.adapter])
            forwards = replaced[variant.emulator.directory] if variant.emulator is not None else {}
            if not forwards:
                return unit.forward(*args, **kwargs)
            with replaced_forwards(unit, forwards) as forward:
                return forward(*args, **kwargs)

        with replaced_values(adapted.streamed, unit, adapted.replacements) as put_values:
            yield run

    return on_unit


def _emulated(unit: Unit, emulator: Emulator, device: torch.device) -> dict[nn.Module, Forward]:
    """Make the forwards that replace those of a unit's compressed linears and experts, by module."""
    forwards: dict[nn.Module, Forward] = {}
    for name, module in named_parts(unit):
        if name in emulator.facts.compressed and is_linear(module):
            forwards[module] = _linear(module, *_moved(emulator.factors(name), weight_of(module).dtype, device))
        stacks = expert_stacks(name, module)
        if stacks is not None and not emulator.facts.stacks.keys().isdisjoint(stacks.paths):
            forwards[module] = _experts(stacks, emulator, device)
    return forwards


def _moved(
    factors: tuple[torch.Tensor, torch.Tensor | None], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    up, down = factors
    return up.to(dtype).to(device), None if down is None else down.to(dtype).to(device)


def _linear(linear: nn.Module, up: torch.Tensor, down: torch.Tensor | None) -> Forward:
    bias = linear.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return lambda x: F.linear(x if down is None else F.linear(x, down), up, bias)


def _experts(stacks: ExpertStacks, emulator: Emulator, device: torch.device) -> Forward:
    """Make the forward of a module of experts with the factors of its compressed stacks."""
    held = {
        leaf: {ending: tensor.to(device) for ending, tensor in emulator.stack(stacks.path(leaf)).items()}
        for leaf in stacks.leaves
        if stacks.path(leaf) in emulator.facts.stacks
    }

    def product(leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        if leaf not in held:
            return stacks.product(leaf, expert, x)
        factors = emulator.expert_factors(stacks.path(leaf), held[leaf], expert)
        up, down = _moved(factors, x.dtype, x.device)
        return F.linear(x if down is None else F.linear(x, down), up)

    return stacks.forward(product)


def open_scored(directory: Path, adapters: Mapping[str, Adapter]) -> tuple[Adapted, Classes | None]:
    """Open the original with adapters attached by name, and its classes if it is a classifier.

    Raises `InputError` if it predicts neither tokens nor classes, or an adapter does not fit.
    """
    adapted = adapted_model(directory, adapters)
    streamed = adapted.streamed
    return adapted, predicted_classes(type(streamed.model), streamed.config, directory)
