"""Batches of held-out samples in, loss sums by sample out, from a stream of the original.

Every batch goes through the stream once for each of v variants of the model: stream index i is batch i // v, variant
i % v.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onelayer.compiler.data.batches import TokenBatch
from onelayer.compiler.data.tokens import IGNORED
from onelayer.compiler.evaluate.samples import Pair, Question
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.meter import FreedMemory
from onelayer.compiler.machine.transfers import Arrivals
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.linears import head_workspace
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import SLICE_BYTES, scoring_bytes
from onelayer.compiler.streaming.spill import SMALLEST_BYTES, SpillPool
from onelayer.compiler.streaming.stream import Stream
from onelayer.compiler.streaming.token_scores import Divergence, TokenScores


@dataclass(frozen=True)
class SampleScores:
    """Sums over the labeled tokens of each sample, for one variant of the model."""

    losses: list[float]
    hits: list[int]
    counts: list[int]

    @classmethod
    def of_none(cls, samples: int) -> "SampleScores":
        """Begin without any tokens."""
        return cls([0.0] * samples, [0] * samples, [0] * samples)

    @property
    def samples(self) -> int:
        """The number of samples that were scored."""
        return sum(count > 0 for count in self.counts)

    def plus(self, other: "SampleScores") -> "SampleScores":
        """Return the sums of both; a sample that one of them lacks has zeros there."""

        def added(one: Sequence[Any], more: Sequence[Any]) -> list[Any]:
            return [a + b for a, b in zip(one, more, strict=True)]

        losses, hits = added(self.losses, other.losses), added(self.hits, other.hits)
        return SampleScores(losses, hits, added(self.counts, other.counts))

    def loss(self, counted: Sequence[bool] | None = None) -> float:
        """Compute the mean cross-entropy in nats over the labeled tokens of the samples that count, all by default.

        Raises `FloatingPointError` if it is not finite: such a score says nothing, and JSON cannot hold it.
        """
        counted = [True] * len(self.counts) if counted is None else counted
        loss = total(self.losses, counted) / total(self.counts, counted)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss}: outputs overflow, by the model's weights or by an adapter; evaluate the model "
                "without adapters to see which"
            )
        return loss

    def right_answers(self, questions: Sequence[Question]) -> int:
        """Count questions whose right choice has the highest log-likelihood; the first choice wins a tie."""
        return sum(
            min(question.samples, key=lambda index: self.losses[index]) == question.samples[question.answer]
            for question in questions
        )

    def right_preferences(self, reference: "SampleScores", pairs: Sequence[Pair]) -> int:
        """Count preferences whose better answer gained more log-likelihood over the reference than the worse one.

        An answer that is not given gains nothing (the implicit reward of DPO, arXiv 2305.18290).
        """

        def gain(index: int | None) -> float:
            return 0.0 if index is None else reference.losses[index] - self.losses[index]

        return sum(gain(pair.better) > gain(pair.worse) for pair in pairs)


def total(values: Sequence[float], counted: Sequence[bool]) -> float:
    """Sum the values of the samples that count."""
    return sum(value for value, counts in zip(values, counted, strict=True) if counts)


class Scoring:
    """Collects the outputs of a stream and scores them; deferred logits by slices of the head, after the last output.

    With `against`, the predictions of that variant are compared with those of variant 0. Hidden states that wait for
    the head are parked where the stream parks its own. Each process of `team` scores its share of the batches. The
    batches hold all samples, unless `samples` counts those of which they are a part.
    """

    def __init__(
        self,
        batches: Sequence[TokenBatch],
        variants: int,
        spill_pool: SpillPool,
        against: int | None = None,
        team: Processes | None = None,
        samples: int | None = None,
    ) -> None:
        self.team = team or Processes()
        self._samples = sum(len(batch.order) for batch in batches) if samples is None else samples
        self.batches = batches = [batches[index] for index in self.team.share(len(batches))]
        self.variants = variants
        self.spill_pool = spill_pool
        self.against = against
        self._rows = [batch.targets != IGNORED for batch in batches]
        self._scores: dict[int, TokenScores] = {}
        self._gaps: dict[int, Divergence] = {}
        self._waiting: dict[int, DeferredLogits] = {}
        self._reference: torch.Tensor | None = None

    def inputs(self) -> list[Mapping[str, torch.Tensor]]:
        """Return the model's arguments for every stream index."""
        return [batch.inputs for batch in self.batches for _ in range(self.variants)]

    def take(self, index: int, output: Any) -> None:
        """Take the output of one batch with one variant; keep only the labeled positions."""
        number, logits = index // self.variants, output.logits
        rows = self._rows[number]
        if isinstance(logits, DeferredLogits):
            logits.hidden = logits.hidden[rows]  # no other position is used
            self.spill_pool.hold(logits.hidden)
            self._waiting[index] = logits
        else:
            self._update(index, slice(0, int(rows.sum())), logits[rows], 0)

    def _update(self, index: int, rows: slice, logits: torch.Tensor, start: int) -> None:
        """Score some logits on the device on which they are."""
        number, variant = divmod(index, self.variants)
        if index not in self._scores:
            labels = self.batches[number].targets[self._rows[number]]
            self._scores[index] = TokenScores(labels.to(logits.device))
        self._scores[index].update(rows, logits, start)
        if self.against is None:
            return
        if variant == 0:
            self._reference = logits
        elif variant == self.against:
            assert self._reference is not None, "variant 0 of a batch comes first"
            if number not in self._gaps:
                self._gaps[number] = Divergence(len(self._scores[index].labels_N), logits.device)
            self._gaps[number].update(rows, self._reference, logits)

    def finish(self, device: torch.device) -> list[SampleScores]:
        """Compute the scores of every variant over the samples of all processes, after the stream has ended."""
        if self._waiting:
            head = next(iter(self._waiting.values())).head
            for start, stop in head.row_slices():
                weight, freed = head.read(start, stop).to(device), FreedMemory()
                step = max(1, SLICE_BYTES // (4 * (stop - start)))
                for number, rows in enumerate(self._rows):
                    for first in range(0, int(rows.sum()), step):
                        for index in range(number * self.variants, (number + 1) * self.variants):
                            logits = self._waiting[index]
                            hidden = logits.hidden[first : first + step].to(device)
                            part = logits.slice_of(hidden, weight, start, stop)
                            self._update(index, slice(first, first + len(part)), part, start)
                        # Batches have logits of many sizes, which touch new parts of a heap that is full of holes.
                        freed.after_unit(self.spill_pool.held_bytes)
            self._waiting.clear()
        results = [SampleScores.of_none(self._samples) for _ in range(self.variants)]
        arrivals = Arrivals()
        figures = arrivals.begin({index: (scores.losses, scores.hits) for index, scores in self._scores.items()})
        arrivals.wait()
        mine = [list(self._by_sample(variant, figures)) for variant in range(self.variants)]
        for found in self.team.gather(mine):
            for result, figures in zip(results, found, strict=True):
                for index, loss, hits, count in figures:
                    result.losses[index], result.hits[index], result.counts[index] = loss, hits, count
        return results

    def _by_sample(
        self, variant: int, figures: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[int, float, int, int]]:
        """Yield number, loss, hits and count of each sample of this process, from the `figures` of its tokens."""
        for number, batch in enumerate(self.batches):
            of_tokens = figures[number * self.variants + variant]
            lengths = self._rows[number].reshape(len(batch.order), -1).sum(dim=1).tolist()
            parts = zip(*(values.split(lengths) for values in of_tokens), strict=True)
            for index, (losses, hits) in zip(batch.order, parts, strict=True):
                yield index, float(losses.sum()), int(hits.sum()), len(losses)

    def token_losses(self, index: int) -> torch.Tensor:
        """Return cross-entropies of the labeled tokens of one stream index, in order, after `finish`."""
        return self._scores[index].losses

    def divergence(self) -> tuple[float, float]:
        """Compute mean KL per labeled token from variant 0 to `against`, and the share of equal best guesses."""
        assert self.against is not None
        sums, counts = [], []
        for number, gap in sorted(self._gaps.items()):
            p, q = (self._scores[number * self.variants + variant] for variant in (0, self.against))
            sums.append((gap.divergences(p, q).sum().double(), (p.best_N == q.best_N).sum()))
            counts.append(len(p.labels_N))
        arrivals = Arrivals()
        arrived = arrivals.begin(sums)
        arrivals.wait()
        mine = [(float(lost), int(same), count) for (lost, same), count in zip(arrived, counts, strict=True)]
        total, agreed, count = map(sum, zip(*(item for found in self.team.gather(mine) for item in found), strict=True))
        return total / count, agreed / count


def scoring_workspace(stream: Stream, batches: Sequence[TokenBatch], variants: int, *, compared: bool = False) -> int:
    """Predict what scoring holds in addition to the largest unit; on a host also the batches that wait.

    With `compared`, the logits of one variant are compared with those of another.
    """
    streamed, loads, on_gpu = stream.streamed, stream.loads, stream.device.type != "cpu"
    parked = 0
    if not on_gpu:
        parked = parked_bytes(streamed, batches, variants, stream.spill_pool)
        states = variants * len(batches) * loads.most_states * max(4, streamed.dtype.itemsize)
        parked = max(parked, min(stream.spill_pool.budget_bytes, states))
    head = head_workspace(streamed, loads.most_rows, compared=compared)
    return scoring_bytes(streamed.largest_unit_bytes, head, loads.most_values(streamed), on_gpu) + parked


def parked_bytes(streamed: StreamedModel, batches: Sequence[TokenBatch], variants: int, spill_pool: SpillPool) -> int:
    """Predict the most that `variants` of all batches hold on the host while they wait, limited by `spill_pool`.

    Every token holds its embedding, its hidden state, its rotary angles (as wide as a head, sine and cosine) and its
    row of an attention mask. Every batch also holds small tensors and frames of the model's own code.
    """
    config = streamed.config.get_text_config()
    width = int(config.hidden_size)
    heads = getattr(config, "num_attention_heads", 1)
    heads = heads if isinstance(heads, int) and heads else 1  # a model of stages has a list, and no rotary angles
    head_width = int(getattr(config, "head_dim", None) or width // heads)
    itemsize = max(4, streamed.dtype.itemsize)
    states = sum(math.prod(batch.shape) * (2 * width + 2 * head_width + batch.shape[1]) * itemsize for batch in batches)
    states += sum(batch.made_bytes for batch in batches)
    return min(spill_pool.budget_bytes, variants * states) + variants * len(batches) * 2 * SMALLEST_BYTES
