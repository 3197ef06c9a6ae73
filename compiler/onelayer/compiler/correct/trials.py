"""Chooses limit, solver and scale of the correction on held-out data; every candidate is scored in one stream.

While a unit of the original is resident, all batches run through it unchanged, which shows what its linears read. Then
the corrections are computed from the unit's weights, and every batch runs with each correction. So the pass reads only
what one evaluation reads, and the emulator's factors. Nothing about the inputs is stored.

Letters: N rows (tokens), in features, r rank of the adapter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from onelayer.compiler.adapters.attach import Adapted, tuner_layers
from onelayer.compiler.adapters.fit import is_transposed
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_bytes, replaced_values
from onelayer.compiler.correct.candidates import CANDIDATES, FEW_ROWS, SCALES, Candidate, Solver
from onelayer.compiler.correct.correction import Gap, oblique_gap
from onelayer.compiler.correct.gaps import linear_gap
from onelayer.compiler.correct.memory import trial_bytes
from onelayer.compiler.data.batches import tokens_digest
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.evaluate.scoring import Scoring, scoring_workspace
from onelayer.compiler.evaluate.variants import Run, open_scored
from onelayer.compiler.factors.sum_grid import SumGrid, settled
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import Processes, processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit, named_parts
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream

NAME = "trained"  # the name under which PEFT attaches the adapter

Weights = tuple[torch.Tensor, torch.Tensor]
UpDown = tuple[torch.Tensor, torch.Tensor | None]  # up and down; or a whole weight and None


@dataclass(frozen=True)
class HeldOut:
    """The data on which a limit is chosen, and how to run it; hidden states beyond `host_memory_bytes` go to disk."""

    data: DataSource
    max_length: int
    batch_size: int
    device: torch.device
    host_memory_bytes: int | None = None
    max_image_pixels: int | None = None


@dataclass(frozen=True)
class Choice:
    """The outcome of the trials: the best candidate, the gaps needed to solve it, and what the stream cost.

    `gaps` holds the linears that the data reached. `validation` identifies the data of the losses.
    """

    best: Candidate
    candidates: list[Candidate]
    gaps: dict[str, Gap]
    validation: dict[str, Any]
    workspace_bytes: int
    bytes_read: int


def score_candidates(adapter: Adapter, emulator: Emulator, model: Path, held_out: HeldOut, meter: Meter) -> Choice:
    """Score all candidate corrections of `adapter` on the original. Raises `InputError` on unusable data."""
    if min(held_out.max_length, held_out.batch_size) < 1:
        raise InputError("max_length and batch_size must be at least 1")
    adapted, classes = open_scored(model, {NAME: adapter})
    streamed = adapted.streamed
    reader = load_reader(model, type(streamed.model), held_out.max_image_pixels)
    samples = Samples.read(held_out.data, reader, held_out.max_length, classes)
    batches = samples.batches(streamed.config, held_out.batch_size)
    variants, spill_pool = 1 + len(CANDIDATES), SpillPool(held_out.host_memory_bytes)
    notice(f"--data: {len(samples.tokens)} rows run {variants} times each, once for every correction that is tried")
    team = processes()
    trials = _Trials(adapter, adapted, emulator, variants, len(batches), team)
    scoring = Scoring(batches, variants, spill_pool, team=team)
    stream = Stream(
        streamed,
        held_out.device,
        meter,
        on_unit=trials.on_unit,
        spill_pool=spill_pool,
        # In every unit, all batches run without a correction before any runs with one.
        priority=lambda index: (index % variants, index),
        description="correct",
        team=team,
    )
    stream.run(scoring.inputs(), scoring.take)
    losses = [scores.loss(samples.counted) for scores in scoring.finish(held_out.device)[1:]]
    candidates = [
        Candidate(solver=solver, limit=limit, scale=scale, loss=loss)
        for (solver, limit, scale), loss in zip(CANDIDATES, losses, strict=True)
    ]
    best = min(candidates, key=lambda candidate: candidate.loss)  # a tie goes to the first, the most cautious
    _tell_doubts(best, sum(samples.counted))
    tried = _trial_workspace(streamed, adapter, emulator, meter.on_gpu)
    workspace = scoring_workspace(stream, batches, variants)
    return Choice(
        best=best,
        candidates=candidates,
        gaps=trials.gaps[best.solver],
        validation={"digest": tokens_digest(samples.tokens), "samples": len(samples.tokens)},
        workspace_bytes=workspace + tried + replaced_bytes(streamed, adapted.replacements),
        bytes_read=streamed.checkpoint.bytes_read,
    )


def _tell_doubts(best: Candidate, rows: int) -> None:
    """Print a notice for each reason to doubt a choice by `rows` held-out rows."""
    if rows < FEW_ROWS:
        notice(f"--data: {rows} rows, and fewer than {FEW_ROWS} choose by chance; give some hundred, or leave it out")
    if best.scale in (min(SCALES), max(SCALES)):
        end = "smallest" if best.scale < 1 else "largest"
        notice(
            f"the scale {best.scale:g} is the {end} that is tried, so a better one may lie beyond it; train on a "
            "larger emulator, or polish the corrected adapter"
        )


def _trial_workspace(streamed: StreamedModel, adapter: Adapter, emulator: Emulator, on_gpu: bool) -> int:
    """Predict what the trials hold, from shapes alone (`trial_bytes`)."""
    sides = sum(item.rank * (item.in_features + item.out_features) for item in adapter.modules.values())
    factors = [[emulator.kept_values(name) for name in _tried(unit, emulator)] for unit in streamed.units]
    return trial_bytes(len(CANDIDATES), sides, factors, on_gpu)


def _adapted(unit: Unit) -> dict[str, LoraLayer]:
    """Map the names of the adapted linears of a unit to PEFT's layers."""
    return {name: part for name, part in named_parts(unit) if isinstance(part, LoraLayer)}


def _tried(unit: Unit, emulator: Emulator) -> list[str]:
    """List the adapted linears of a unit that the emulator compresses, so that they are corrected."""
    return [name for name in _adapted(unit) if name in emulator.facts.compressed]


@dataclass
class _Trials:
    """The trials in one unit: observe it while it runs unchanged, compute its corrections, run it with each."""

    adapter: Adapter
    adapted: Adapted
    emulator: Emulator
    variants: int
    batches: int
    team: Processes
    gaps: dict[Solver, dict[str, Gap]] = field(default_factory=lambda: {"span": {}, "oblique": {}})

    @contextmanager
    def on_unit(self, unit: Unit) -> Iterator[Run]:
        """Run stream index i as variant i % variants: 0 is the original, then the candidates. Restore all on exit."""
        layers: dict[str, Any] = _adapted(unit)
        compressed = {name: layers[name] for name in _tried(unit, self.emulator)}
        switches = tuner_layers(unit)
        adapted = compressed.values()
        before = {layer: (layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data) for layer in adapted}
        scalings = {layer: layer.scaling[NAME] for layer in layers.values()}
        factors = {name: self.emulator.factors(name) for name in compressed}
        watch = _Watch(self.batches, self.team)
        for name, layer in compressed.items():
            linear = layer.get_base_layer()
            if name not in self.gaps["span"]:  # a unit may become resident again
                rows, transposed = iter([linear.weight.detach()]), is_transposed(linear)
                self.gaps["span"][name] = linear_gap(self.adapter, name, rows, factors[name], transposed)
            watch.attach(name, linear, self.gaps["span"][name].p)
        weights: dict[Any, list[Weights]] = {}

        def run(index: int, args: Any, kwargs: Any) -> Any:
            variant = index % self.variants
            put_values(NAME if variant > 0 else None)
            for part in switches:
                part.enable_adapters(variant > 0)
            if variant == 0:
                output = unit.forward(*args, **kwargs)
                watch.settle()
                return output
            if not weights:
                weights.update(self._solve(compressed, factors, watch))
            _set({layer: solved[variant - 1] for layer, solved in weights.items()})
            for layer, scaling in scalings.items():  # solved weights already contain their scale
                layer.scaling[NAME] = 1.0 if layer in before else CANDIDATES[variant - 1][2] * scaling
            return unit.forward(*args, **kwargs)

        try:
            with replaced_values(self.adapted.streamed, unit, self.adapted.replacements) as put_values:
                yield run
            if not weights and not self.team.is_alone:  # this process has no batch, but a part in the sums
                self._solve(compressed, factors, watch)
        finally:
            watch.detach()
            _set(before)
            for layer, scaling in scalings.items():
                layer.scaling[NAME] = scaling

    def _solve(
        self, compressed: Mapping[str, Any], factors: Mapping[str, UpDown], watch: "_Watch"
    ) -> dict[Any, list[Weights]]:
        """Compute A' and B_c of every candidate by layer, in float32, on the device of the weights."""
        watch.detach()
        watch.add_up()
        weights: dict[Any, list[Weights]] = {}
        for name, layer in compressed.items():
            linear = layer.get_base_layer()
            rows, span = [linear.weight.detach()], self.gaps["span"][name]
            if name not in self.gaps["oblique"]:
                seen, transposed = watch.seen[name].to(span.p), is_transposed(linear)
                self.gaps["oblique"][name] = oblique_gap(span, rows, *factors[name], seen, transposed)
            solved = [self.gaps[solver][name].limited(limit).scaled(scale) for solver, limit, scale in CANDIDATES]
            device = linear.weight.device
            a = solved[0].a.to(device, torch.float32)
            weights[layer] = [(a, item.b.to(device, torch.float32)) for item in solved]
        return weights


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
        p = p.to(weight.device, torch.float32)
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
