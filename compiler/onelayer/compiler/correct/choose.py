"""Chooses limit, solver and scale of a correction by the loss on held-out data, in two streams of the original.

All corrections that are tried run over a share of the rows, and the best of them over the others too (successive
halving, arXiv 1502.07943, with one round). With few rows all run over all of them, in one stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.adapters.attach import Adapted
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_bytes
from onelayer.compiler.correct.candidates import (
    CANDIDATES,
    FEW_ROWS,
    FINALISTS,
    SCALES,
    Candidate,
    Trial,
    first_rows,
    runs_per_row,
)
from onelayer.compiler.correct.correction import Gap
from onelayer.compiler.correct.memory import trial_bytes
from onelayer.compiler.correct.trials import NAME, Gaps, Trials, tried_linears
from onelayer.compiler.data.batches import TokenBatch, tokens_digest
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.evaluate.scoring import SampleScores, Scoring, parked_bytes, scoring_workspace
from onelayer.compiler.evaluate.variants import open_scored
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream


@dataclass(frozen=True)
class HeldOut:
    """The data on which a correction is chosen, and how to run it; hidden states beyond the budget go to disk."""

    data: DataSource
    max_length: int
    batch_size: int
    device: torch.device
    host_memory_bytes: int | None = None
    max_image_pixels: int | None = None


@dataclass(frozen=True)
class Choice:
    """The outcome of the trials: the best candidate, the gaps needed to solve it, and what the streams cost.

    `gaps` holds the linears that the data reached. `validation` identifies the data of the losses.
    """

    best: Candidate
    candidates: list[Candidate]
    gaps: dict[str, Gap]
    validation: dict[str, Any]
    workspace_bytes: int
    bytes_read: int


def score_candidates(adapter: Adapter, emulator: Emulator, model: Path, held_out: HeldOut, meter: Meter) -> Choice:
    """Score the corrections of `adapter` on the original, those that can win on all rows.

    Raises `InputError` on unusable data.
    """
    if min(held_out.max_length, held_out.batch_size) < 1:
        raise InputError("max_length and batch_size must be at least 1")
    adapted, classes = open_scored(model, {NAME: adapter})
    streamed = adapted.streamed
    reader = load_reader(model, type(streamed.model), held_out.max_image_pixels)
    samples = Samples.read(held_out.data, reader, held_out.max_length, classes)
    batches = samples.counted_batches(streamed.config, held_out.batch_size)
    rows = sum(samples.counted)
    trials = _Passes(adapter, adapted, emulator, held_out, meter, rows)
    first, others = _divided(batches, rows)
    _tell_cost(rows, sum(len(batch.order) for batch in first))
    scores = trials.scores((None, *CANDIDATES), first, others)[1:]
    if others:
        ranked = sorted(range(len(CANDIDATES)), key=lambda number: scores[number].loss())
        finalists = sorted(ranked[:FINALISTS])
        more = trials.scores([CANDIDATES[number] for number in finalists], others, [])
        for number, added in zip(finalists, more, strict=True):
            scores[number] = scores[number].plus(added)
    candidates = [
        Candidate(solver=solver, limit=limit, scale=scale, loss=found.loss(), rows=found.samples)
        for (solver, limit, scale), found in zip(CANDIDATES, scores, strict=True)
    ]
    # A tie goes to the first, the most cautious.
    best = min((item for item in candidates if item.rows == rows), key=lambda item: item.loss)
    _tell_doubts(best, rows)
    tried = _trial_workspace(streamed, adapter, emulator, meter.on_gpu)
    return Choice(
        best=best,
        candidates=candidates,
        gaps=trials.gaps[best.solver],
        validation={"digest": tokens_digest(samples.tokens), "samples": len(samples.tokens)},
        workspace_bytes=trials.workspace_bytes + tried + replaced_bytes(streamed, adapted.replacements),
        bytes_read=streamed.checkpoint.bytes_read,
    )


def _divided(batches: Sequence[TokenBatch], rows: int) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """Divide batches into those of every correction and those of the finalists.

    The former are spread evenly over the lengths of the rows.
    """
    wanted = first_rows(rows)
    if wanted == rows or len(batches) == 1:
        return list(batches), []
    first: list[TokenBatch] = []
    others: list[TokenBatch] = []
    taken, seen = 0, 0
    for batch in batches:
        seen += len(batch.order)
        is_due = taken * rows < wanted * seen  # fewer were taken than the share of those seen
        (first if is_due else others).append(batch)
        taken += len(batch.order) if is_due else 0
    return first, others


@dataclass
class _Passes:
    """The streams over the original that score corrections of one adapter, of `rows` held-out rows in all."""

    adapter: Adapter
    adapted: Adapted
    emulator: Emulator
    held_out: HeldOut
    meter: Meter
    rows: int
    gaps: Gaps = field(default_factory=lambda: {"span": {}, "oblique": {}})
    workspace_bytes: int = 0

    def __post_init__(self) -> None:
        self._spill_pool = SpillPool(self.held_out.host_memory_bytes)
        self._team = processes()

    def scores(
        self, variants: Sequence[Trial | None], batches: Sequence[TokenBatch], unscored: Sequence[TokenBatch]
    ) -> list[SampleScores]:
        """Score every variant on `batches`, in one stream; the first variant also runs over those `unscored`."""
        streamed, device, team = self.adapted.streamed, self.held_out.device, self._team
        scoring = Scoring(batches, len(variants), self._spill_pool, team=team, samples=self.rows)
        scored, inputs = len(scoring.batches), scoring.inputs()
        more = [unscored[index].inputs for index in team.share(len(unscored))]
        together = len(batches) + len(unscored)
        trials = Trials(self.adapter, self.adapted, self.emulator, variants, scored, together, team, self.gaps)
        stream = Stream(
            streamed,
            device,
            self.meter,
            on_unit=trials.on_unit,
            spill_pool=self._spill_pool,
            priority=trials.order,
            description="correct",
            team=team,
        )
        stream.run([*inputs, *more], lambda index, output: scoring.take(index, output) if index < len(inputs) else None)
        held = scoring_workspace(stream, batches, len(variants))
        waiting = parked_bytes(streamed, unscored, 1, self._spill_pool) if device.type == "cpu" else 0
        self.workspace_bytes = max(self.workspace_bytes, held + waiting)
        return scoring.finish(device)


def _tell_cost(rows: int, first: int) -> None:
    """Print how often the original runs over the held-out rows."""
    tried, runs = len(CANDIDATES), runs_per_row(rows, first)
    if first == rows:
        notice(f"--data: {rows} rows run {1 + tried} times each, once for every correction that is tried")
    else:
        notice(
            f"--data: {tried} corrections run over {first} rows, the best {FINALISTS} over all {rows}: each row runs "
            f"{runs:.1f} times on average, and the original is read twice"
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
    factors = [[emulator.kept_values(name) for name in tried_linears(unit, emulator)] for unit in streamed.units]
    return trial_bytes(len(CANDIDATES), sides, factors, on_gpu)
