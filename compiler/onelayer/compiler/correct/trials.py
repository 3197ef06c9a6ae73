"""Runs a resident unit of the original with every correction that is tried.

All batches run through a unit unchanged, which shows what its linears read. Then the corrections are computed from the
unit's weights, and batches run with each correction. Nothing about the inputs is stored.

Letters: N rows (tokens), in features, r rank of the adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from onelayer.compiler.adapters.attach import Adapted, tuner_layers
from onelayer.compiler.adapters.fit import is_transposed
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_values
from onelayer.compiler.correct.candidates import Solver, Trial
from onelayer.compiler.correct.correction import Gap, Oblique
from onelayer.compiler.correct.gaps import checked, linear_gap
from onelayer.compiler.correct.shared_runs import SharedRuns
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.evaluate.variants import Run
from onelayer.compiler.factors.sum_grid import SumGrid, settled
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.transfers import Arrivals, upload
from onelayer.compiler.models.units import Unit, named_parts

NAME = "trained"  # the name under which PEFT attaches the adapter

Weights = tuple[torch.Tensor, torch.Tensor]
UpDown = tuple[torch.Tensor, torch.Tensor | None]  # up and down; or a whole weight and None
Gaps = dict[Solver, dict[str, Gap]]


def _adapted(unit: Unit) -> dict[str, LoraLayer]:
    """Map the names of the adapted linears of a unit to PEFT's layers."""
    return {name: part for name, part in named_parts(unit) if isinstance(part, LoraLayer)}


def tried_linears(unit: Unit, emulator: Emulator) -> list[str]:
    """List the adapted linears of a unit that the emulator compresses, so that they are corrected."""
    return [name for name in _adapted(unit) if name in emulator.facts.compressed]


@dataclass
class Trials:
    """The trials of one stream, in a unit: observe it while it runs unchanged, solve, run it with each correction.

    A variant is a correction that is tried, or None for the original. Stream index i is batch i // v with variant i % v
    of v, for `scored` batches; those after them run as the original only. `batches` counts the calls that are observed
    at most. `gaps` are found while the original runs, and known if no variant is the original.
    """

    adapter: Adapter
    adapted: Adapted
    emulator: Emulator
    variants: Sequence[Trial | None]
    scored: int
    batches: int
    team: Processes
    gaps: Gaps = field(default_factory=lambda: {"span": {}, "oblique": {}})
    _observing: bool = False

    def __post_init__(self) -> None:
        self.shared = SharedRuns(len(self.variants))
        self._trials = [trial for trial in self.variants if trial is not None]
        self._originals = len(self.variants) - len(self._trials)
        self._firsts: list[
            tuple[int, ...]
        ] = []  # by correction, which has the same weights: for each linear, the first

    def place(self, index: int) -> tuple[int, int]:
        """Return batch and variant of a stream index."""
        extra = index - self.scored * len(self.variants)
        return divmod(index, len(self.variants)) if extra < 0 else (self.scored + extra, 0)

    def order(self, index: int) -> tuple[bool, int, int, int]:
        """Return what orders the calls in a unit.

        All batches run unchanged before any runs with a correction. Variants that are still the same follow each other.
        """
        batch, variant = self.place(index)
        is_late = self._observing and self.variants[variant] is not None
        return is_late, batch, self.shared.first[variant], variant

    @contextmanager
    def on_unit(self, unit: Unit) -> Iterator[Run]:
        """Run each stream index as its variant. Restore all on exit."""
        layers: dict[str, Any] = _adapted(unit)
        compressed = {name: layers[name] for name in tried_linears(unit, self.emulator)}
        switches, adapted = tuner_layers(unit), compressed.values()
        before = {layer: (layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data) for layer in adapted}
        scalings = {layer: layer.scaling[NAME] for layer in layers.values()}
        watch = _Watch(self.batches, self.team)
        self._observing = bool(compressed) and self._originals > 0
        factors = self._observe(compressed, watch) if self._observing else {}
        weights: dict[Any, list[Weights]] = {}
        self.shared.enter_unit()
        if switches or self._replaces_in(unit):
            self.shared.split(partial(self._are_alike, len(layers) > len(compressed)))

        def run(index: int, args: Any, kwargs: Any) -> Any:
            batch, variant = self.place(index)
            trial = self.variants[variant]
            put_values(None if trial is None else NAME)
            for part in switches:
                part.enable_adapters(trial is not None)
            if trial is not None:
                if compressed and not weights:
                    weights.update(self._solve(compressed, factors, watch))
                    self.shared.split(self._weigh_alike)
                _set({layer: solved[variant - self._originals] for layer, solved in weights.items()})
                for layer, scaling in scalings.items():  # solved weights already contain their scale
                    layer.scaling[NAME] = 1.0 if layer in before else trial[2] * scaling
            if batch < self.scored:
                output = self.shared.run(unit, batch, variant, args, kwargs)
            else:
                output = unit.forward(*args, **kwargs)
            if trial is None and self._observing:
                watch.settle()
            return output

        try:
            with replaced_values(self.adapted.streamed, unit, self.adapted.replacements) as put_values:
                yield run
            if self._observing and not weights:  # no correction ran here; its batches, if any, are a part of the sums
                self._solve(compressed, factors, watch)
        finally:
            watch.detach()
            _set(before)
            for layer, scaling in scalings.items():
                layer.scaling[NAME] = scaling

    def _observe(self, compressed: Mapping[str, Any], watch: "_Watch") -> dict[str, UpDown]:
        """Watch what linears read in the directions of their adapters; return the emulator's factors."""
        factors = {name: self.emulator.factors(name) for name in compressed}
        known, found, arrivals = self.gaps["span"], dict[str, tuple[Gap, torch.Tensor]](), Arrivals()
        for name, layer in compressed.items():
            linear = layer.get_base_layer()
            if name not in known:  # a unit may become resident again
                rows, transposed = iter([linear.weight.detach()]), is_transposed(linear)
                gap = linear_gap(self.adapter, name, rows, factors[name], transposed)
                found[name] = (gap, arrivals.begin(gap.error))
            watch.attach(name, linear, (known.get(name) or found[name][0]).p)
        arrivals.wait()
        known |= {name: checked(name, gap.there(error)) for name, (gap, error) in found.items()}
        return factors

    def _replaces_in(self, unit: Unit) -> bool:
        """Whether the adapter replaces parameters of a unit."""
        return any(not each.keys().isdisjoint(unit.parameters) for each in self.adapted.replacements.values())

    def _are_alike(self, scales: bool, first: int, second: int) -> bool:
        """Whether two variants may do the same in an adapted unit; `scales`: their scale counts even uncorrected."""
        one, other = self.variants[first], self.variants[second]
        if one is None or other is None:
            return one is other
        return not scales or one[2] == other[2]

    def _weigh_alike(self, first: int, second: int) -> bool:
        """Whether two variants have the same weights in the unit whose corrections were solved last."""
        one, other = first - self._originals, second - self._originals
        return min(one, other) >= 0 and self._firsts[one] == self._firsts[other]

    def _solve(
        self, compressed: Mapping[str, Any], factors: Mapping[str, UpDown], watch: "_Watch"
    ) -> dict[Any, list[Weights]]:
        """Compute A' and B_c of every correction by layer, in float32, on the device of the weights."""
        watch.detach()
        if self._observing:
            watch.add_up()
            self._find_oblique(compressed, factors, watch)
        weights: dict[Any, list[Weights]] = {}
        firsts = []
        for name, layer in compressed.items():
            solved = [self.gaps[solver][name].limited(limit).scaled(scale) for solver, limit, scale in self._trials]
            device = layer.get_base_layer().weight.device
            a, *b = (side.to(torch.float32) for side in (solved[0].a, *(item.b for item in solved)))
            firsts.append(_first_equals(b))
            a = upload(a, device)
            weights[layer] = [(a, upload(each, device)) for each in b]
        self._firsts = list(zip(*firsts, strict=True))
        return weights

    def _find_oblique(self, compressed: Mapping[str, Any], factors: Mapping[str, UpDown], watch: "_Watch") -> None:
        """Find the gaps for all inputs of each linear; the host waits for what all of them read, and once more."""
        wanted = {name: layer for name, layer in compressed.items() if name not in self.gaps["oblique"]}
        arrivals = Arrivals()
        seen = arrivals.begin({name: watch.seen[name] for name in wanted})
        arrivals.wait()
        missed: dict[str, tuple[Oblique, torch.Tensor]] = {}
        for name, layer in wanted.items():
            linear, span = layer.get_base_layer(), self.gaps["span"][name]
            if (oblique := Oblique.of(span, seen[name].to(span.p))) is None:
                self.gaps["oblique"][name] = span
                continue
            error = oblique.missed([linear.weight.detach()], *factors[name], is_transposed(linear))
            missed[name] = (oblique, arrivals.begin(error))
        arrivals.wait()
        self.gaps["oblique"] |= {name: oblique.gap(error) for name, (oblique, error) in missed.items()}


def _first_equals(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return for each of some tensors on the host the number of the first that is equal to it."""
    firsts: list[int] = []
    for place, tensor in enumerate(tensors):
        others = (other for other in dict.fromkeys(firsts) if torch.equal(tensors[other], tensor))
        firsts.append(next(others, place))
    return firsts


class _Watch:
    """A sum of x x^T p (in, r) over the inputs that linears read, in float64, without rows that are not finite."""

    def __init__(self, batches: int, team: Processes) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self._grids: dict[str, SumGrid] = {}
        self._batches, self._team = batches, team
        self._is_settled = team.is_alone
        self._handles: list[RemovableHandle] = []

    def attach(self, name: str, linear: nn.Module, p: torch.Tensor) -> None:
        """Watch one linear in the directions `p` (in, r)."""
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        p = upload(p.to(torch.float32), weight.device)
        self.seen[name] = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        grid = self._grids[name] = SumGrid(self._batches, not self._team.is_first)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_NF = args[0].reshape(-1, len(p)).float()
            x_NF = x_NF.masked_fill(~torch.isfinite(x_NF.sum(dim=-1, keepdim=True)), 0.0)
            self.seen[name] += grid.rounded(x_NF.T @ (x_NF @ p))

        self._handles.append(linear.register_forward_pre_hook(hook))

    def settle(self) -> None:
        """Let the sums of all processes have the grids of process 0; call it after the first batch."""
        if not self._is_settled:
            self.seen.update(settled(self._grids, self.seen, self._team))
            self._is_settled = True

    def add_up(self) -> None:
        """Replace the sums by those over the batches of all processes."""
        self.settle()
        self._team.add_up(list(self.seen.values()))

    def detach(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()


def _set(weights: Mapping[Any, Weights]) -> None:
    for layer, (a, b) in weights.items():
        layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data = a, b
