"""The limit of the correction, chosen on held-out data: every candidate scored in one stream of the original.

While a unit is held, the corrections of its linears are computed from its own weights, and each batch runs through it
once for every candidate. So the pass reads what one evaluation reads, and the emulator's factors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from onelayer.compiler.adapter import Adapter
from onelayer.compiler.adapter_fit import is_transposed
from onelayer.compiler.calibration import DataSource, tokens_digest
from onelayer.compiler.correct_pass import gap_of
from onelayer.compiler.correction import Gap
from onelayer.compiler.emulator_reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate import open_language_model
from onelayer.compiler.measure import Meter, Result
from onelayer.compiler.scoring import Samples, Scoring, workspace_bytes
from onelayer.compiler.stream import Stream
from onelayer.compiler.tokens import load_tokenizer
from onelayer.compiler.units import Unit
from onelayer.compiler.variants import Run, named_parts

# 0 leaves the adapter as trained; None is the whole correction; 3 is the paper's choice.
LIMITS: tuple[float | None, ...] = (0.0, 1.0, 3.0, 10.0, None)
NAME = "trained"  # of the one adapter that PEFT attaches

Weights = tuple[torch.Tensor, torch.Tensor]


class Candidate(Result):
    """One limit that was tried, 0 for the adapter as trained and None for no limit, and the held-out loss with it."""

    limit: float | None
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """The data that a limit is chosen on, and how it is run."""

    data: DataSource
    max_length: int
    batch_size: int
    device: torch.device


@dataclass
class Choice:
    """What the stream found: the gaps of the linears that it held, the losses, and what it cost.

    `validation` says what the losses were measured on.
    """

    candidates: list[Candidate]
    gaps: dict[str, Gap]
    validation: dict[str, Any]
    workspace_bytes: int
    bytes_read: int

    @property
    def limit(self) -> float | None:
        """The candidate of the lowest loss; the smaller limit of two that are equal."""
        return min(self.candidates, key=lambda candidate: candidate.loss).limit


def try_limits(source: Adapter, small: Emulator, model: Path, held_out: HeldOut, meter: Meter) -> Choice:
    """Score the corrections of `source` under every limit on the original. Raises `InputError` on unusable data."""
    if min(held_out.max_length, held_out.batch_size) < 1:
        raise InputError("max_length and batch_size must be at least 1")
    streamed = open_language_model(model, {NAME: source.directory})
    samples = Samples.read(held_out.data, load_tokenizer(model), held_out.max_length)
    batches = samples.batches(streamed.config, held_out.batch_size)
    trials, scoring = _Trials(source, small), Scoring(batches, len(LIMITS))
    stream = Stream(streamed, held_out.device, meter, around=trials.around, description="correct")
    stream.run(scoring.inputs(), scoring.take)
    found = scoring.finish(held_out.device)
    losses = [scores.loss(samples.counted) for scores in found]
    # Of every adapted linear A', B', D and, for one unit at a time, the candidates' B_c; of one linear its factors.
    sides = sum(item.rank * (item.in_features + item.out_features) for item in source.modules.values())
    largest = max((4 * rank * sum(small.shape(name)) for name, rank in small.facts.ranks.items()), default=0)
    return Choice(
        candidates=[Candidate(limit=limit, loss=loss) for limit, loss in zip(LIMITS, losses, strict=True)],
        gaps=trials.gaps,
        validation={"digest": tokens_digest(samples.tokens), "samples": len(samples.tokens)},
        workspace_bytes=workspace_bytes(streamed, batches) + 8 * 2 * len(LIMITS) * sides + 2 * largest,
        bytes_read=streamed.checkpoint.bytes_read,
    )


@dataclass
class _Trials:
    """Computes the corrections of a unit when it is held, and runs it with each."""

    source: Adapter
    small: Emulator
    gaps: dict[str, Gap] = field(default_factory=dict)

    @contextmanager
    def around(self, unit: Unit) -> Iterator[Run]:
        """Stream index i runs with the limit i % n. The adapter's own values are back on exit."""
        layers: dict[str, Any] = {name: part for name, part in named_parts(unit) if isinstance(part, LoraLayer)}
        compressed = {name: layer for name, layer in layers.items() if name in self.small.facts.ranks}
        weights = {layer: self._candidates(name, layer.get_base_layer()) for name, layer in compressed.items()}
        before = {layer: (layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data) for layer in weights}
        scalings = {layer: layer.scaling[NAME] for layer in weights}

        def run(index: int, args: Any, kwargs: Any) -> Any:
            _set({layer: candidates[index % len(LIMITS)] for layer, candidates in weights.items()})
            return type(unit.module).forward(unit.module, *args, **kwargs)

        try:
            for layer in weights:
                layer.scaling[NAME] = 1.0
            yield run
        finally:
            _set(before)
            for layer, scaling in scalings.items():
                layer.scaling[NAME] = scaling

    def _candidates(self, name: str, linear: nn.Module) -> list[Weights]:
        """A' and B_c under every limit, in float32, where the linear's weight is."""
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        if name not in self.gaps:  # a unit may be held again
            rows = iter([weight.detach()])
            self.gaps[name] = gap_of(self.source, name, rows, self.small.factors(name), is_transposed(linear))
        solved = [self.gaps[name].limited(limit) for limit in LIMITS]
        a = solved[0].a.to(weight.device, torch.float32)
        return [(a, item.b.to(weight.device, torch.float32)) for item in solved]


def _set(weights: Mapping[Any, Weights]) -> None:
    for layer, (a, b) in weights.items():
        layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data = a, b
