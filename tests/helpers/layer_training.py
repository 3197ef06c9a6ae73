"""Refinement of one layer of a resident model, as the documentation says, in plain torch."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onelayer.compiler.emulators.reader import Emulator


@dataclass(frozen=True)
class Training:
    """How a layer is trained; `seed` is that of the layer."""

    steps: int
    rate: float
    samples: int
    seed: int


class Factored(nn.Module):
    """A linear of an emulator, in plain torch."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.T.clone().contiguous()), nn.Parameter(down.clone())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.down.T) @ self.up
        return y if self.bias is None else y + self.bias.detach()


def watched(model: Any, batches: list[Any]) -> list[list[tuple[Any, Any, torch.Tensor]]]:
    """Collect arguments and output of every call of every layer of a resident model."""
    calls: list[list[Any]] = [[] for _ in model.model.layers]
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output, own=own: own.append((args, kwargs, output)), with_kwargs=True
        )
        for layer, own in zip(model.model.layers, calls, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def trained_factors(
    model: Any, emulator: Emulator, prefix: str, calls: Any, sizes: list[int], training: Training
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Train the factors of the layer `prefix` on (args, kwargs, target) of its calls; return up and down by name."""
    layer = copy.deepcopy(model.get_submodule(prefix)).requires_grad_(False)
    linears = {}
    for name in (name for name in emulator.facts.ranks if name.startswith(prefix + ".")):
        path = name.removeprefix(prefix + ".")
        up, down = emulator.factors(name)
        assert down is not None
        linears[name] = Factored(up, down, layer.get_submodule(path).bias)
        parent, _, leaf = path.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, linears[name])
    _train(
        layer,
        [p for linear in linears.values() for p in linear.parameters() if p.requires_grad],
        calls,
        sizes,
        training,
    )
    return {name: (linear.up.detach().T, linear.down.detach()) for name, linear in linears.items()}


def _train(layer: Any, parameters: list[Any], calls: Any, sizes: list[int], training: Training) -> None:
    """Run the steps of a layer's training."""
    generator = torch.Generator().manual_seed(training.seed)
    rates = [training.rate * float(parameter.detach().square().mean().sqrt()) for parameter in parameters]
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)])
    waiting: list[int] = []
    for step in range(training.steps):
        chosen: list[int] = []
        while sum(sizes[index] for index in chosen) < training.samples:
            waiting = waiting or torch.randperm(len(calls), generator=generator).tolist()
            chosen.append(waiting.pop(0))
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - step / training.steps)
        total = sum(sizes[index] for index in chosen)
        for index in chosen:
            args, kwargs, target = calls[index]
            loss = (layer(*args, **kwargs) - target).square().mean() / target.square().mean()
            (loss * sizes[index] / total).backward()
        optimizer.step()
        optimizer.zero_grad()
