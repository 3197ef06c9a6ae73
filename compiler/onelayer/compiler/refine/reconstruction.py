"""Trains one unit's factors to reproduce the original unit's outputs for the original's inputs; no I/O.

This is block reconstruction, which BRECQ uses for rounding (arXiv 2102.05426, section 3). The factorization is optimal
for each linear alone; training finds a better one for the linears of a unit together, at the same bytes. With gradients
the unit also learns what flows back, which is what an emulator is used for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from onelayer.compiler.factors.moments import check_rows
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.transfers import Transfers
from onelayer.compiler.models.units import Unit
from onelayer.compiler.refine.calls import Call
from onelayer.compiler.refine.distances import Distances, twice_differentiable
from onelayer.compiler.refine.settings import ResolvedRefineSettings
from onelayer.compiler.refine.trained_experts import Trained


@dataclass(frozen=True)
class UnitErrors:
    """The relative errors of a unit over all its calls, root mean square: of outputs, and of gradients if known."""

    outputs: float
    gradients: float | None = None

    def relative_to(self, begun: "UnitErrors") -> float:
        """Compute what training lowers: squared errors as shares of those before it; of both kinds, their sum."""
        shares = [(self.outputs / begun.outputs) ** 2 if begun.outputs else 0.0]
        if self.gradients is not None and begun.gradients:
            shares.append((self.gradients / begun.gradients) ** 2)
        return sum(shares)


def refine_unit(
    unit: Unit,
    linears: Mapping[str, Trained],
    calls: Sequence[Call],
    settings: ResolvedRefineSettings,
    meter: Meter,
    team: Processes,
    promised_bytes: int,
) -> tuple[UnitErrors, UnitErrors]:
    """Train the factors of one resident unit; `linears` are keyed by their module's path below the unit.

    Each process of `team` has calls of its own, and all move the factors alike. When training has shown what it takes
    itself, calls that fit into `promised_bytes` together with it stay on the device. Returns the unit's relative errors
    over all calls before and after. If training does not lower them, the factors are restored. Raises `RuntimeError` if
    the outputs are not finite before training, and `InputError` if gradients are known and the unit has no second
    derivative.
    """
    masters = [master for linear in linears.values() for master in linear.masters.values()]
    begun = [master.clone() for master in masters]
    for call in calls:
        call.check_unchanged()
    counts = team.gather((sum(call.dropped_rows for call in calls), sum(call.rows for call in calls)))
    check_rows(unit.name, *map(sum, zip(*counts, strict=True)))
    calls = [call for call in calls if call.weight]
    meter.restart_peak()
    distances = Distances(unit, linears, Transfers(meter.device))
    before = _errors(distances, calls, team)
    if not math.isfinite(before.outputs + (before.gradients or 0)):
        raise RuntimeError(f"{unit.name}: its outputs are not finite; check the checkpoint's dtype and the data")
    try:
        _train(distances, before, calls, settings, meter, team, promised_bytes)
    except RuntimeError as error:
        raise twice_differentiable(unit, error) or error from None
    after = _errors(distances, calls, team)
    if after.relative_to(before) < before.relative_to(before):
        return before, after
    for master, value in zip(masters, begun, strict=True):
        master.copy_(value)
    return before, before


def _train(
    distances: Distances,
    before: UnitErrors,
    calls: Sequence[Call],
    settings: ResolvedRefineSettings,
    meter: Meter,
    team: Processes,
    promised_bytes: int,
) -> None:
    """Run Adam with a learning rate that falls linearly to zero; every unit shuffles its calls with its own seed.

    After a round through all calls the peak is known, and what it leaves of `promised_bytes` holds calls.
    """
    linears = distances.linears.values()
    masters = [master for linear in linears for master in linear.masters.values()]
    sizes = torch.stack([master.square().mean().sqrt() for master in masters]).tolist()  # the host waits once
    rates = [settings.learning_rate * size for size in sizes]
    groups = [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, foreach=False)  # one factor at a time; foreach would copy all of them
    parts = team.gather([call.weight for call in calls])
    weights, first = [weight for part in parts for weight in part], sum(map(len, parts[: team.rank]))
    rounds = _shuffled(weights, settings, distances.unit.position)
    seen, is_kept = set[int](), False
    for step, chosen in zip(range(settings.steps), rounds, strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / settings.steps)
        total = sum(weights[index] for index in chosen)
        # With gradients nothing is left out: code without a second derivative raises only where autograd reaches it.
        learned = [factor for linear in linears for factor in linear.rounded.values()]
        used = None if before.gradients else learned
        if len(seen) == len(weights) and not is_kept:
            is_kept = True
            distances.transfers.keep((call.tensors for call in calls), promised_bytes - meter.peak_since_restart)
        seen.update(chosen)
        for call in (calls[index - first] for index in chosen if first <= index < first + len(calls)):
            with torch.enable_grad():
                loss = _loss(distances, before, call)
                # There is no graph if none of the linears took part in the call.
                if loss.requires_grad:
                    torch.autograd.backward(loss * (call.weight / total), inputs=used)
            meter.sample()
        _add_up_gradients(learned, team)
        for linear in linears:
            linear.hand_gradients()
        optimizer.step()
        for linear in linears:
            linear.round()


def _loss(distances: Distances, before: UnitErrors, call: Call) -> torch.Tensor:
    """Compute what a step lowers; outputs and gradients weigh the same, each as a share of its error before."""
    if not before.gradients:
        return distances.of_outputs(call, guarded=True)[0]
    outputs, _, gradients = distances.of_both(call)
    tiny = torch.finfo(torch.float32).tiny
    return outputs / max(before.outputs**2, tiny) + gradients / max(before.gradients**2, tiny)


def _add_up_gradients(factors: Sequence[torch.Tensor], team: Processes) -> None:
    """Give every process the gradients of all. A factor that has none in any process keeps none."""
    if team.is_alone:
        return
    used = [any(anywhere) for anywhere in zip(*team.gather([f.grad is not None for f in factors]), strict=True)]
    for factor in (factor for factor, is_used in zip(factors, used, strict=True) if is_used):
        if factor.grad is None:
            factor.grad = torch.zeros_like(factor)
        team.add_up([factor.grad])


def _shuffled(weights: Sequence[float], settings: ResolvedRefineSettings, position: int) -> Iterator[list[int]]:
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


@torch.no_grad()
def _errors(distances: Distances, calls: Sequence[Call], team: Processes) -> UnitErrors:
    """Compute ||found - the original's|| / ||the original's||, root mean square over samples and tensors."""
    found, counts = [], []
    for call in calls:
        if call.gradients:
            distance, outputs, back = distances.of_both(call)
        else:
            (distance, outputs), back = distances.of_outputs(call), torch.zeros((), device=distances.device)
        found += [distance.float(), back.float()]
        counts.append((call.weight, outputs, call.weight if call.gradients else 0.0))
    values = torch.stack(found).reshape(-1, 2).tolist() if found else []  # the host waits once
    total, count, total_back, count_back = 0.0, 0.0, 0.0, 0.0
    for part in team.gather(list(zip(values, counts, strict=True))):
        for (distance, back), (weight, outputs, weight_back) in part:
            total, count = total + weight * distance, count + weight * outputs
            total_back, count_back = total_back + weight_back * back, count_back + weight_back
    gradients = math.sqrt(total_back / count_back) if count_back else None
    return UnitErrors(math.sqrt(total / max(1, count)), gradients)
