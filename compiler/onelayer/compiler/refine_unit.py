"""One unit's factors in, the same trained to give the original unit's outputs for the original's inputs; no I/O.

Block reconstruction, as BRECQ does it for rounding (arXiv 2102.05426, section 3): the factorisation is the best for
each linear alone, this is a better one for what the linears of a unit do together, at the same bytes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.measure import Meter
from onelayer.compiler.seams import Kept, differentiable
from onelayer.compiler.side_channels import called
from onelayer.compiler.trained_factors import TrainedLinear
from onelayer.compiler.units import Unit


@dataclass(frozen=True)
class Pace:
    """How to train: `steps` for each unit, of `step_samples` or a few more; the rate is relative to a factor's size."""

    steps: int
    step_samples: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if min(self.steps, self.step_samples) < 1:
            raise InputError("--steps and --step-samples must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--learning-rate {self.learning_rate}: must be above 0, for example 0.01")


@dataclass(frozen=True)
class Call:
    """One call of the original unit for some samples: what went in, and the tensors that came out, on the host."""

    samples: int
    kept: Kept
    targets: list[torch.Tensor]
    versions: list[int]

    @classmethod
    def of(cls, samples: int, kept: Kept, outputs: Any) -> "Call":
        """Keep the outputs beside what is kept of the inputs."""
        targets = [output.detach() for output in differentiable(outputs)]
        return cls(samples, kept, targets, [target._version for target in targets])

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` where the model's code changed an input or an output in place after the call."""
        self.kept.check_unchanged()
        if self.versions != [target._version for target in self.targets]:
            raise RuntimeError("an output was changed in place after the unit had given it, so it cannot be learned")


def refine_unit(
    unit: Unit, linears: Mapping[str, TrainedLinear], calls: Sequence[Call], pace: Pace, meter: Meter
) -> tuple[float, float]:
    """Train the factors of one unit, which is resident; `linears` by their module's path below it.

    Returns the unit's relative output error over all calls before and after; where it would not be less, the factors
    are what they were. Raises `RuntimeError` where the outputs are not finite before.
    """
    masters = [master for linear in linears.values() for master in linear.masters.values()]
    begun = [master.clone() for master in masters]
    device = masters[0].device
    for call in calls:
        call.check_unchanged()
    with _standing_in(unit, linears):
        before = _error(unit, calls, device)
        if not math.isfinite(before):
            raise RuntimeError(f"{unit.name}: its outputs are not finite; check the checkpoint's dtype and the data")
        _train(unit, list(linears.values()), calls, pace, meter)
        after = _error(unit, calls, device)
    if after < before:
        return before, after
    for master, value in zip(masters, begun, strict=True):
        master.copy_(value)
    return before, before


def _train(unit: Unit, linears: Sequence[TrainedLinear], calls: Sequence[Call], pace: Pace, meter: Meter) -> None:
    """Adam with a rate that falls to zero in a straight line; calls in an order of the unit's own."""
    masters = [master for linear in linears for master in linear.masters.values()]
    rates = [pace.learning_rate * float(master.square().mean().sqrt()) for master in masters]
    groups = [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, foreach=False)  # one factor after the other: no copies of all of them
    for step, chosen in zip(range(pace.steps), _shuffled(calls, pace, unit.position), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / pace.steps)
        total = sum(call.samples for call in chosen)
        used = [factor for linear in linears for factor in linear.rounded.values()]
        for call in chosen:
            with torch.enable_grad():
                distance, _ = _distance(unit, call, masters[0].device)
                # Without a graph where none of the linears had a part in the call.
                if distance.requires_grad:
                    torch.autograd.backward(distance * (call.samples / total), inputs=used)
            meter.sample()
        for linear in linears:
            linear.hand_gradients()
        optimizer.step()
        for linear in linears:
            linear.round()


def _shuffled(calls: Sequence[Call], pace: Pace, position: int) -> Iterator[list[Call]]:
    """The calls of one step after the other: all in turn, in another order every time."""
    generator = torch.Generator().manual_seed(pace.seed * 1_000_003 + position)
    chosen: list[Call] = []
    while True:
        for index in torch.randperm(len(calls), generator=generator).tolist():
            chosen.append(calls[index])
            if sum(call.samples for call in chosen) >= pace.step_samples:
                yield chosen
                chosen = []


def _distance(unit: Unit, call: Call, device: torch.device) -> tuple[torch.Tensor, int]:
    """The squared distance of the unit's outputs from the original's, relative to each one's size, and their number."""
    (arguments, contents), _ = call.kept.again(device)
    forward = partial(type(unit.module).forward, unit.module)
    outputs = differentiable(called(lambda args, kwargs: forward(*args, **kwargs), arguments, contents))
    total = torch.zeros((), device=device)
    for output, target in zip(outputs, call.targets, strict=True):
        wide = torch.promote_types(output.dtype, torch.float32)
        exact = target.to(device, wide)
        lost, energy = (output.to(wide) - exact).abs().square().mean(), exact.abs().square().mean()
        total = total + lost / energy.clamp_min(torch.finfo(torch.float32).tiny)
    return total, len(outputs)


@torch.no_grad()
def _error(unit: Unit, calls: Sequence[Call], device: torch.device) -> float:
    """||outputs - the original's|| / ||the original's||, root mean square over samples and outputs."""
    total, count = 0.0, 0
    for call in calls:
        distance, outputs = _distance(unit, call, device)
        total, count = total + call.samples * float(distance), count + call.samples * outputs
    return math.sqrt(total / max(1, count))


@contextmanager
def _standing_in(unit: Unit, linears: Mapping[str, TrainedLinear]) -> Iterator[None]:
    """The unit computes with the factors in place of the weights meanwhile."""
    modules: dict[str, Any] = {path: unit.module.get_submodule(path) for path in linears}
    try:
        for path, module in modules.items():
            # An instance attribute hides the class's forward from `__call__` and is gone when deleted.
            module.forward = partial(linears[path].product, bias=module.bias)
        yield
    finally:
        for module in modules.values():
            del module.forward
