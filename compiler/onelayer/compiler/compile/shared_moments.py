"""Adds up the moments that several processes gathered of one unit, each where its linears are compressed."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from onelayer.compiler.codes.forms import OUTPUT_BLOCK
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.compile.linear_moments import MomentHooks, of_output
from onelayer.compiler.factors.moments import Gram, Moments
from onelayer.compiler.factors.sum_grid import settled
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.models.linears import weight_shape


def settle_grids(hooks: MomentHooks, team: Processes) -> None:
    """Take the grids of process 0, which has the first batch; every process calls it once, after its own first one."""
    moments = hooks.moments
    energies = {f"{name} energy": item for name, item in moments.items() if item.input_energy is not None}
    grids = {name: item.gram.grid for name, item in moments.items()}
    grids |= {name: item.energy_grid for name, item in energies.items()}
    totals = {name: item.gram.total_FF for name, item in moments.items()}
    totals |= {name: item.input_energy for name, item in energies.items() if item.input_energy is not None}
    on_grid = settled(grids, totals, team)
    for name, item in moments.items():
        item.gram.total_FF = on_grid[name]
    for name, item in energies.items():
        item.input_energy = on_grid[name]


def add_up_moments(hooks: MomentHooks, team: Processes) -> None:
    """Leave in `hooks` the sums over all processes for the linears that this one compresses, and only those.

    Linears that share a moment in every process are compressed by one process. The work is spread by its cost.
    """
    if team.is_alone:
        return
    moments, inputs = hooks.moments, hooks.inputs
    grams: dict[str, Any] = {name: item.gram for name, item in moments.items()} | inputs
    of_input = {name: name in inputs or moments[name].of_input for name in grams}
    described = team.gather({name: (_group(name, grams), of_input[name]) for name in grams})
    refused = set[str]().union(*team.gather(hooks.refused))
    names = dict.fromkeys(name for found in described for name in found if name not in refused)
    by_input = {name: all(found[name][1] for found in described if name in found) for name in names}
    summed, blocks = dict[str, Moments](), dict[str, BlockGram]()
    counted: list[tuple[Gram | BlockGram, torch.Tensor]] = []
    owners = _owners(_groups(described, names), hooks.linears, team.count)
    for group, owner in owners.items():
        members = [name for name in group if name in names]
        if hooks.sides:
            known = inputs.get(members[0])
            gram = known or BlockGram(weight_shape(hooks.linears[members[0]])[1], hooks.device)
            total, counts = gram.added_up(partial(team.add_up_in, owner))
            blocks |= dict.fromkeys(members, total) if owner == team.rank else {}
            counted += [(total, counts)] if owner == team.rank else []
        else:
            mine = _own(members[0], by_input[members[0]], hooks)
            counts = _reduce(mine, owner, team)
            counted += [(mine.gram, counts)] if owner == team.rank else []
            summed |= dict.fromkeys(members, mine) if owner == team.rank else {}
    _add_up_outputs(hooks, {name: owner for group, owner in owners.items() for name in group if name in names}, team)
    _count_rows(counted)
    moments.clear()
    moments.update(summed)
    hooks.take_inputs(blocks)


def _add_up_outputs(hooks: MomentHooks, owners: Mapping[str, int], team: Processes) -> None:
    """Add up the moments of the gradients at each linear's outputs in the process that compresses it."""
    known = set[str]().union(*team.gather(set(hooks.outputs)))
    for name, owner in owners.items():
        if name in known:
            own = hooks.outputs.get(name)
            gram = own or BlockGram(weight_shape(hooks.linears[name])[0], hooks.device, OUTPUT_BLOCK)
            hooks.outputs[name], _ = gram.added_up(partial(team.add_up_in, owner))


def _own(name: str, of_input: bool, hooks: MomentHooks) -> Moments:
    """Return this process's part of the moments of a linear; empty ones if it never called the linear."""
    mine = hooks.moments.get(name)
    if mine is None:
        shape = weight_shape(hooks.linears[name])
        return Moments.empty(shape, of_input, hooks.device, hooks.product_dtype)
    return of_output(mine.gram, hooks.linears[name]) if mine.of_input and not of_input else mine


def _group(name: str, grams: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that share a linear's Gram."""
    return tuple(other for other, gram in grams.items() if gram is grams[name])


def _groups(described: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that share a moment: those of every process if they agree, else each by itself."""
    groups = {name: {found[name][0] for found in described if name in found} for name in names}
    if any(len(found) > 1 for found in groups.values()):
        return [(name,) for name in groups]
    return sorted({min(found) for found in groups.values()})


def _owners(groups: Sequence[tuple[str, ...]], linears: Mapping[str, Any], count: int) -> dict[tuple[str, ...], int]:
    """Give each group to the process that has least to do, the most expensive group first."""
    costs = {group: sum(_cost(linears[name]) for name in group if name in linears) for group in groups}
    loads = [0.0] * count
    owners = {}
    for group in sorted(groups, key=lambda group: (-costs[group], group)):
        owner = loads.index(min(loads))
        owners[group] = owner
        loads[owner] += costs[group]
    return owners


def _cost(linear: torch.nn.Module) -> float:
    """Estimate the operations of a factorization, in some unit."""
    out_features, in_features = weight_shape(linear)
    narrow = min(out_features, in_features)
    return float(narrow) ** 2 * (narrow + out_features + in_features)


def _count_rows(counted: Sequence[tuple[Gram | BlockGram, torch.Tensor]]) -> None:
    """Note of each sum over all processes how many rows it has; the host waits once for all."""
    if counted:
        for (gram, _), (_, rows) in zip(counted, torch.stack([counts for _, counts in counted]).tolist(), strict=True):
            gram.rows = rows


def _reduce(moments: Moments, owner: int, team: Processes) -> torch.Tensor:
    """Add up one linear's moments in the process `owner`; return the rows left out and all rows, on the device."""
    gram = moments.gram
    counts = torch.stack([gram.dropped, torch.tensor(gram.rows).to(gram.dropped)])
    sums = [gram.total_FF, counts] + ([] if moments.input_energy is None else [moments.input_energy])
    for tensor in sums:
        team.add_up_in(owner, tensor)
    gram.dropped = counts[0]
    return counts
