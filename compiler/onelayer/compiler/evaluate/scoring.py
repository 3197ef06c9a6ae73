"""What is scored, and the figures of it: held-out samples in, loss sums by sample out, from a stream of the original.

Every batch goes through the stream once for each variant of the model; stream index i is batch i // v, variant i % v.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.classes import Classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import IGNORED, Tokens, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.token_scores import Divergence, TokenScores
from onelayer.compiler.models.lazy_tensors import DeferredLogits
from onelayer.compiler.models.linears import widest
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import SLICE_BYTES, scoring_bytes
from onelayer.compiler.streaming.spill import SMALLEST_BYTES, SpillPool


@dataclass(frozen=True)
class Question:
    """A multiple-choice example: the samples of its choices, in order, and which of the choices is right."""

    samples: range
    answer: int


@dataclass(frozen=True)
class Samples:
    """Held-out data, tokenized. `counted[i]`: the loss counts sample i; wrong choices only compete with right ones."""

    tokens: list[Tokens]
    counted: list[bool]
    questions: list[Question]

    @classmethod
    def read(
        cls, data: DataSource, tokenizer: PreTrainedTokenizerBase, max_length: int, classes: Classes | None = None
    ) -> "Samples":
        """All examples of `data`, for a model that predicts `classes`, or tokens.

        Raises `InputError` where nothing is left to count, or choices cannot be compared.
        """

        def tokenize_row(example: Example) -> list[Tokens]:
            if example.choices is None or classes is not None:
                return [tokenize_for(classes, example, tokenizer, max_length)]
            return _choices(example, tokenizer, max_length)

        rows, _ = labeled_rows(data, tokenize_row, max_length)
        samples = cls([tokens for _, tokens in rows], [], [])
        for _, group in groupby(rows, key=lambda row: id(row[0])):
            same = [example for example, _ in group]
            example, first, count = same[0], len(samples.counted), len(same)
            if example.answer is None or classes is not None:
                samples.counted.append(True)
            else:
                samples.counted.extend(number == example.answer for number in range(count))
                samples.questions.append(Question(range(first, first + count), example.answer))
        return samples

    def batches(self, config: PreTrainedConfig, batch_size: int) -> list[TokenBatch]:
        """The samples as batches that the model can be called with."""
        return make_batches(self.tokens, config, batch_size)


def _choices(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """The tokens of every choice of an example. Raises `InputError` where a choice does not fit or is empty."""
    rows = []
    for number, choice in enumerate(example.choices or ()):
        # A choice that is cut would win by its shortness, so it has to fit as a whole.
        tokens = tokenize(example.with_choice(number), tokenizer, max_length + 1)
        if len(tokens.input_ids) > max_length:
            raise InputError(
                f"{example.source}: with choice {number} it has more than {max_length} tokens; raise --max-length"
            )
        if not tokens.labeled:
            raise InputError(f"{example.source}: choice {number} ({choice!r}) has no token of its own; reword it")
        rows.append(tokens)
    return rows


@dataclass(frozen=True)
class SampleScores:
    """Sums over the labeled tokens of each sample, for one variant of the model."""

    losses: list[float]
    hits: list[int]
    counts: list[int]

    def loss(self, counted: Sequence[bool]) -> float:
        """Mean cross-entropy in nats over the labeled tokens of the samples that count."""
        return total(self.losses, counted) / total(self.counts, counted)

    def right_answers(self, questions: Sequence[Question]) -> int:
        """How many questions have their right choice as the one of highest log-likelihood; the first wins a tie."""
        return sum(
            min(question.samples, key=lambda index: self.losses[index]) == question.samples[question.answer]
            for question in questions
        )


def total(values: Sequence[float], counted: Sequence[bool]) -> float:
    """Sum over the samples that count."""
    return sum(value for value, counts in zip(values, counted, strict=True) if counts)


class Scoring:
    """Collects what the stream hands out, and scores it: deferred logits by slices of the head, once all are there.

    With `against` set, the predictions of that variant are compared with those of variant 0. Hidden states that wait
    for the head are parked where the stream parks its own.
    """

    def __init__(
        self, batches: Sequence[TokenBatch], variants: int, spill_pool: SpillPool, against: int | None = None
    ) -> None:
        self.batches = batches
        self.variants = variants
        self.spill_pool = spill_pool
        self.against = against
        self._rows = [batch.targets != IGNORED for batch in batches]
        self._scores: dict[int, TokenScores] = {}
        self._gaps = [Divergence(int(rows.sum())) for rows in self._rows] if against is not None else []
        self._waiting: dict[int, DeferredLogits] = {}
        self._reference: torch.Tensor | None = None

    def inputs(self) -> list[dict[str, torch.Tensor]]:
        """The model's arguments for every stream index."""
        return [batch.inputs for batch in self.batches for _ in range(self.variants)]

    def take(self, index: int, output: Any) -> None:
        """One batch with one variant has run through; keeps only what its labeled positions need."""
        number, logits = index // self.variants, output.logits
        rows = self._rows[number]
        self._scores[index] = TokenScores(self.batches[number].targets[rows])
        if isinstance(logits, DeferredLogits):
            logits.hidden = logits.hidden[rows]  # no other position is ever asked for
            self.spill_pool.hold(logits.hidden)
            self._waiting[index] = logits
        else:
            self._update(index, slice(0, int(rows.sum())), logits[rows], 0)

    def _update(self, index: int, rows: slice, logits: torch.Tensor, start: int) -> None:
        self._scores[index].update(rows, logits, start)
        number, variant = divmod(index, self.variants)
        if self.against is None:
            return
        if variant == 0:
            self._reference = logits
        elif variant == self.against:
            assert self._reference is not None, "variant 0 of a batch comes first"
            self._gaps[number].update(rows, self._reference, logits)

    def finish(self, device: torch.device) -> list[SampleScores]:
        """The scores of every variant, once the stream has ended."""
        if self._waiting:
            head = next(iter(self._waiting.values())).head
            for start, stop in head.row_slices():
                weight = head.read(start, stop).to(device)
                step = max(1, SLICE_BYTES // (4 * (stop - start)))
                for number, rows in enumerate(self._rows):
                    for first in range(0, int(rows.sum()), step):
                        for index in range(number * self.variants, (number + 1) * self.variants):
                            logits = self._waiting[index]
                            hidden = logits.hidden[first : first + step].to(device)
                            part = logits.slice_of(hidden, weight, start, stop)
                            self._update(index, slice(first, first + len(part)), part.cpu(), start)
            self._waiting.clear()
        return [self._by_sample(variant) for variant in range(self.variants)]

    def _by_sample(self, variant: int) -> SampleScores:
        count = sum(len(batch.order) for batch in self.batches)
        result = SampleScores([0.0] * count, [0] * count, [0] * count)
        for number, batch in enumerate(self.batches):
            scores = self._scores[number * self.variants + variant]
            lengths = self._rows[number].reshape(len(batch.order), -1).sum(dim=1).tolist()
            parts = zip(scores.losses.split(lengths), scores.hits.split(lengths), strict=True)
            for index, (losses, hits) in zip(batch.order, parts, strict=True):
                result.losses[index] = float(losses.sum())
                result.hits[index] = int(hits.sum())
                result.counts[index] = len(losses)
        return result

    def token_losses(self, index: int) -> torch.Tensor:
        """Cross-entropies of the labeled tokens of one stream index, in order, once `finish` has run."""
        return self._scores[index].losses

    def divergence(self) -> tuple[float, float]:
        """Mean KL per labeled token from variant 0 to `against`, and the share of tokens whose best guess agrees."""
        assert self.against is not None
        total, agreed, count = 0.0, 0, 0
        for number, gap in enumerate(self._gaps):
            p, q = (self._scores[number * self.variants + variant] for variant in (0, self.against))
            total += float(gap.divergences(p, q).sum())
            agreed += int((p.best_N == q.best_N).sum())
            count += len(p.labels_N)
        return total / count, agreed / count


def scoring_workspace(
    streamed: StreamedModel, batches: Sequence[TokenBatch], variants: int, device: torch.device, spill_pool: SpillPool
) -> int:
    """Predict what scoring holds in addition to the largest unit; on a host also the batches that wait."""
    tokens = max(math.prod(batch.shape) for batch in batches)
    parked = parked_bytes(streamed, batches, variants, spill_pool) if device.type == "cpu" else 0
    return scoring_bytes(streamed.largest_unit_bytes, widest(streamed), tokens) + parked


def parked_bytes(streamed: StreamedModel, batches: Sequence[TokenBatch], variants: int, spill_pool: SpillPool) -> int:
    """The most that `variants` of all batches hold on the host while they wait, at most what `spill_pool` lets them.

    Of every token its embedding and its hidden state, its place in rotary angles (as wide as a head, sine and cosine)
    and its row of an attention mask; of every batch the small tensors and frames of the model's own code.
    """
    config = streamed.config.get_text_config()
    width = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    head_width = int(getattr(config, "head_dim", None) or width // heads)
    itemsize = max(4, streamed.dtype.itemsize)
    states = sum(math.prod(batch.shape) * (2 * width + 2 * head_width + batch.shape[1]) * itemsize for batch in batches)
    return min(spill_pool.budget_bytes, variants * states) + variants * len(batches) * 2 * SMALLEST_BYTES
