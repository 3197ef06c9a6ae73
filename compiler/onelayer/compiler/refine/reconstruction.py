"""Trains one unit's factors to reproduce the original unit's outputs for the original's inputs; no I/O.

This is block reconstruction, which BRECQ uses for rounding (arXiv 2102.05426, section 3). The factorization is optimal
for each linear alone; training finds a better one for the linears of a unit together, at the same bytes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from onelayer.compiler.factors.moments import check_rows, finite_rows, row_count
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.units import Unit, replaced_forwards
from onelayer.compiler.refine.settings import RefineSettings
from onelayer.compiler.refine.trained_linears import TrainedLinear
from onelayer.compiler.streaming.unit_boundary import UnitInputs, differentiable, rerun


@dataclass(frozen=True)
class Call:
    """One call of the original unit for some samples: its inputs and its output tensors, on the host.

    `finite` has a mask (rows,) for each target, true for rows that are entirely finite; None if all rows are.
    """

    samples: int
    kept: UnitInputs
    targets: list[torch.Tensor]
    versions: list[int]
    finite: list[torch.Tensor | None]

    @classmethod
    def of(cls, samples: int, kept: UnitInputs, outputs: Any) -> "Call":
        """Keep the outputs together with the kept inputs."""
        targets = [output.detach() for output in differentiable(outputs)]
        finite = [finite_rows(target) for target in targets]
        return cls(samples, kept, targets, [target._version for target in targets], finite)

    @property
    def rows(self) -> int:
        """The number of rows of all targets."""
        return sum(map(row_count, self.targets))

    @property
    def dropped_rows(self) -> int:
        """The number of rows that are not finite."""
        return sum(int((~mask).sum()) for mask in self.finite if mask is not None)

    @property
    def weight(self) -> float:
        """The number of samples, multiplied by the share of rows that are finite."""
        return self.samples * (1 - self.dropped_rows / max(1, self.rows))

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if the model's code changed an input or an output in place after the call."""
        self.kept.check_unchanged()
        if self.versions != [target._version for target in self.targets]:
            raise RuntimeError("an output was changed in place after the unit returned it, so it cannot be learned")


def refine_unit(
    unit: Unit,
    linears: Mapping[str, TrainedLinear],
    calls: Sequence[Call],
    settings: RefineSettings,
    meter: Meter,
    team: Processes,
) -> tuple[float, float]:
    """Train the factors of one resident unit; `linears` are keyed by their module's path below the unit.

    Each process of `team` has calls of its own, and all move the factors alike. Returns the unit's relative output
    error over all calls before and after. If training does not lower it, the factors are restored. Raises
    `RuntimeError` if the outputs are not finite before training.
    """
    masters = [master for linear in linears.values() for master in linear.masters.values()]
    begun = [master.clone() for master in masters]
    device = masters[0].device
    for call in calls:
        call.check_unchanged()
    counts = team.gather((sum(call.dropped_rows for call in calls), sum(call.rows for call in calls)))
    check_rows(unit.name, *map(sum, zip(*counts, strict=True)))
    calls = [call for call in calls if call.weight]
    with _factors_in_place(unit, linears):
        before = _error(unit, calls, device, team)
        if not math.isfinite(before):
            raise RuntimeError(f"{unit.name}: its outputs are not finite; check the checkpoint's dtype and the data")
        _train(unit, linears, calls, settings, meter, team)
        after = _error(unit, calls, device, team)
    if after < before:
        return before, after
    for master, value in zip(masters, begun, strict=True):
        master.copy_(value)
    return before, before


def _train(
    unit: Unit,
    linears: Mapping[str, TrainedLinear],
    calls: Sequence[Call],
    settings: RefineSettings,
    meter: Meter,
    team: Processes,
) -> None:
    """Run Adam with a learning rate that falls linearly to zero; every unit shuffles its calls with its own seed."""
    masters = [master for linear in linears.values() for master in linear.masters.values()]
    sizes = torch.stack([master.square().mean().sqrt() for master in masters]).tolist()  # the host waits once
    rates = [settings.learning_rate * size for size in sizes]
    groups = [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, foreach=False)  # one factor at a time; foreach would copy all of them
    parts = team.gather([call.weight for call in calls])
    weights, first = [weight for part in parts for weight in part], sum(map(len, parts[: team.rank]))
    for step, chosen in zip(range(settings.steps), _shuffled(weights, settings, unit.position), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / settings.steps)
        total = sum(weights[index] for index in chosen)
        used = [factor for linear in linears.values() for factor in linear.rounded.values()]
        for call in (calls[index - first] for index in chosen if first <= index < first + len(calls)):
            with torch.enable_grad(), _guarded(unit, linears if call.dropped_rows else ()):
                distance, _ = _distance(unit, call, masters[0].device)
                # There is no graph if none of the linears took part in the call.
                if distance.requires_grad:
                    torch.autograd.backward(distance * (call.weight / total), inputs=used)
            meter.sample()
        _add_up_gradients(used, team)
        for linear in linears.values():
            linear.hand_gradients()
        optimizer.step()
        for linear in linears.values():
            linear.round()


def _add_up_gradients(factors: Sequence[torch.Tensor], team: Processes) -> None:
    """Give every process the gradients of all. A factor that has none in any process keeps none."""
    if team.is_alone:
        return
    used = [any(anywhere) for anywhere in zip(*team.gather([f.grad is not None for f in factors]), strict=True)]
    for factor in (factor for factor, is_used in zip(factors, used, strict=True) if is_used):
        if factor.grad is None:
            factor.grad = torch.zeros_like(factor)
        team.add_up([factor.grad])


def _shuffled(weights: Sequence[float], settings: RefineSettings, position: int) -> Iterator[list[int]]:
    """Yield the numbers of the calls of each step; every round goes through all calls, in a new order."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + position)
    chosen, weight = list[int](), 0.0
    while True:
        for index in torch.randperm(len(weights), generator=generator).tolist():
            chosen.append(index)
            weight += weights[index]
            if weight >= settings.step_samples:
                yield chosen
                chosen, weight = [], 0.0


def _distance(unit: Unit, call: Call, device: torch.device) -> tuple[torch.Tensor, int]:
    """Sum the outputs' squared distances from the original's, relative to each output's size; return also their number.

    An output without finite rows is not counted.
    """
    outputs, _ = rerun(unit, call.kept, device)
    total, counted = torch.zeros((), device=device), 0
    for output, target, finite in zip(outputs, call.targets, call.finite, strict=True):
        wide = torch.promote_types(output.dtype, torch.float32)
        found, exact = output.to(wide), target.to(device, wide)
        if finite is not None:
            keep = finite.to(device)
            found, exact = (values.reshape(row_count(values), -1)[keep] for values in (found, exact))
        if exact.numel() or finite is None:
            lost, energy = (found - exact).abs().square().mean(), exact.abs().square().mean()
            total, counted = total + lost / energy.clamp_min(torch.finfo(torch.float32).tiny), counted + 1
    return total, counted


@torch.no_grad()
def _error(unit: Unit, calls: Sequence[Call], device: torch.device, team: Processes) -> float:
    """Compute ||outputs - the original's|| / ||the original's||, root mean square over samples and outputs."""
    found = [_distance(unit, call, device) for call in calls]
    distances = torch.stack([distance for distance, _ in found]).tolist() if found else []  # the host waits once
    mine = [(call.weight, value, outputs) for call, value, (_, outputs) in zip(calls, distances, found, strict=True)]
    total, count = 0.0, 0.0
    for weight, distance, outputs in (item for part in team.gather(mine) for item in part):
        total, count = total + weight * distance, count + weight * outputs
    return math.sqrt(total / max(1, count))


def _factors_in_place(unit: Unit, linears: Mapping[str, TrainedLinear]) -> AbstractContextManager[Any]:
    """Let the unit compute with the factors instead of the weights; restore the weights on exit."""
    modules: dict[str, Any] = {path: unit.module.get_submodule(path) for path in linears}
    return replaced_forwards(
        unit, {module: partial(linears[path].product, bias=module.bias) for path, module in modules.items()}
    )


@contextmanager
def _guarded(unit: Unit, paths: Iterable[str]) -> Iterator[None]:
    """Replace rows and gradients that are not finite by zeros in the linears at `paths`.

    A product's gradient sums over rows. One row that is not finite would spoil it, even if its output does not count.
    """

    def finite(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isfinite(rows).all(dim=-1, keepdim=True), rows, 0)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return finite(args[0]), *args[1:]

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(finite)

    with ExitStack() as handles:
        for path in paths:
            module = unit.module.get_submodule(path)
            handles.enter_context(module.register_forward_pre_hook(before))
            handles.enter_context(module.register_forward_hook(after))
        yield
