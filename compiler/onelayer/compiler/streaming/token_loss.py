"""The loss of next-token prediction and its gradient at the hidden states, from slices of the head. No logits whole.

The head is read twice for all batches together: once for the normalization, once for the gradient. A head that is one
slice is read and multiplied once for both. Shape letters: N predicted tokens, S a slice of the vocabulary, H hidden
size.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onelayer.compiler.data.batches import TokenBatch
from onelayer.compiler.data.tokens import IGNORED
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.models.deferred_logits import BY_SLICES, DeferredLogits
from onelayer.compiler.models.unit_memory import LOGITS_COPIES, SLICE_BYTES
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.token_scores import TokenScores

Scale = float | torch.Tensor
# Copies of logits in float32 that torch holds while it takes the gradient of their cross-entropy: the log-softmax, its
# gradient, and that of the logits. Beyond 32 MiB glibc maps each of them anew, page by page.
AT_ONCE_COPIES, AT_ONCE_BYTES = 3, 32 << 20


@dataclass
class _Waiting:
    """One batch's logits that are not formed yet; `hidden` (N, H) are the states of its predictions, in the graph.

    `gradient` (N, H) in float32 is the gradient at `hidden`, once it is known; `pool` holds it.
    """

    logits: DeferredLogits
    hidden: torch.Tensor
    scores: TokenScores
    pool: SpillPool | None = None
    gradient: torch.Tensor | None = None

    @property
    def is_one_slice(self) -> bool:
        """Whether the head is so small that all logits of a prediction are formed at once."""
        return next(self.logits.head.row_slices()) == (0, self.logits.head.shape[0])

    def begin_gradient(self) -> None:
        """Make room for the gradient."""
        self.gradient = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.hidden.device)
        if self.pool is not None:
            self.pool.hold(self.gradient)


class TokenLoss:
    """Mean cross-entropy over all labeled tokens of the batches together, in float32 as transformers computes it.

    The first `trained` batches form one mean, whose gradients go back; the others form another, which is only
    measured. Hand `inputs` and `take` to the forward stream, then call `finish`. Each process of `team` has its share
    of both: `places` are their numbers among all, of which the first `trained` here are trained on. `pool` holds the
    hidden states that wait for the head, and their gradients.
    """

    def __init__(
        self,
        batches: Sequence[TokenBatch],
        trained: int,
        device: torch.device,
        team: Processes | None = None,
        pool: SpillPool | None = None,
    ) -> None:
        self.team, self.pool = team or Processes(), pool or SpillPool()
        self.places, self.trained = self.team.share_of_both(trained, len(batches) - trained)
        self.batches = [batches[place] for place in self.places]
        self.device = device
        tokens = [int((batch.targets != IGNORED).sum()) for batch in batches]
        self.trained_tokens, self._scored_tokens = sum(tokens[:trained]), sum(tokens[trained:])
        self._rows = [batch.targets != IGNORED for batch in self.batches]
        self._sums = [0.0] * len(self.batches)
        self._trained_sums, self._scored_sums = list[float](), list[float]()  # of all processes
        self._waiting: dict[int, _Waiting] = {}

    @property
    def inputs(self) -> list[Mapping[str, torch.Tensor]]:
        """The model's arguments for every batch of this process."""
        return [batch.inputs for batch in self.batches]

    @property
    def loss(self) -> float:
        """Mean over the tokens trained on, in nats."""
        return sum(self._trained_sums) / self.trained_tokens

    @property
    def held_out_loss(self) -> float | None:
        """Mean over the tokens that are only scored; None where there are none."""
        return sum(self._scored_sums) / self._scored_tokens if self._scored_tokens else None

    def take(self, index: int, output: Any) -> None:
        """One batch has run through. Logits that exist are dealt with at once, others wait for the head."""
        rows, logits = self._rows[index], output.logits
        labels_N = self.batches[index].targets[rows]
        with torch.set_grad_enabled(index < self.trained):
            if isinstance(logits, DeferredLogits):
                hidden_NH = logits.hidden[rows]
                self.pool.hold((logits.hidden, hidden_NH))
                self._waiting[index] = _Waiting(logits, hidden_NH, TokenScores(labels_N.to(self.device)), self.pool)
                return
            losses_N = torch.nn.functional.cross_entropy(logits[rows].float(), labels_N, reduction="none")
            self._sums[index] = float(losses_N.detach().sum(dtype=torch.float64))
            if index < self.trained and losses_N.requires_grad:
                (losses_N.sum() / self.trained_tokens).backward(retain_graph=True)

    def finish(self) -> bool:
        """Read the head, fill in the losses, send gradients back; False, and none sent, where a loss is not finite."""
        scale = 1 / max(1, self.trained_tokens)
        trained = [index for index, waiting in self._waiting.items() if index < self.trained]
        scales = {index: scale for index in trained if self._waiting[index].hidden.requires_grad}
        _score(self._waiting, scales)
        if self._waiting:  # the host waits once for all
            sums = torch.stack([waiting.scores.losses.sum() for waiting in self._waiting.values()]).tolist()
            for index, value in zip(self._waiting, sums, strict=True):
                self._sums[index] = value
        found = self.team.gather((self._sums[: self.trained], self._sums[self.trained :]))
        self._trained_sums = [value for trained, _ in found for value in trained]
        self._scored_sums = [value for _, scored in found for value in scored]
        if not all(map(math.isfinite, [*self._trained_sums, *self._scored_sums])):
            return False
        _differentiate(self._waiting, scales)
        for index in scales:
            waiting = self._waiting.pop(index)
            assert waiting.gradient is not None
            # Code after the last unit may share a graph with code before other units, which is still to be walked.
            waiting.hidden.backward(waiting.gradient.to(waiting.hidden.dtype), retain_graph=True)
        self._waiting.clear()
        return True


def _score(waiting: Mapping[int, _Waiting], scales: Mapping[int, Scale]) -> None:
    """Read the head for the scores; if it is one slice, also for the gradients of those in `scales`, times these."""
    at_once = {index for index in scales if waiting[index].is_one_slice}
    for index in at_once:
        waiting[index].begin_gradient()
    for index, rows, weight, bounds in _slices(waiting, sorted(waiting), at_once):
        if index in at_once:
            _take_at_once(waiting[index], rows, weight, scales[index])
        else:
            logits, scores = waiting[index].logits, waiting[index].scores
            hidden_NH = waiting[index].hidden[rows].detach().to(weight.device)
            scores.update(rows, logits.slice_of(hidden_NH, weight, *bounds), bounds[0])


def _differentiate(waiting: Mapping[int, _Waiting], scales: Mapping[int, Scale]) -> None:
    """Read the head for the gradients of those in `scales`, times these, where scoring has not found them."""
    missing = [index for index in sorted(scales) if waiting[index].gradient is None]
    for index in missing:
        waiting[index].begin_gradient()
    for index, rows, weight, bounds in _slices(waiting, missing):
        _add_gradient(waiting[index], rows, weight, bounds, scales[index])


def _slices(
    waiting: Mapping[int, _Waiting], indices: Iterable[int], at_once: Collection[int] = ()
) -> Iterator[tuple[int, slice, torch.Tensor, tuple[int, int]]]:
    """Every slice of the head once, with every piece of the waiting predictions that is as small as a slice.

    Pieces are smaller where torch takes the gradient of their cross-entropy, and of operations on logits.
    """
    present = [index for index in indices if index in waiting]
    if not present:
        return
    head, device = waiting[present[0]].logits.head, waiting[present[0]].scores.labels_N.device
    for start, stop in head.row_slices():
        weight = head.read(start, stop).to(device)
        for index in present:
            count = len(waiting[index].hidden)
            copies = waiting[index].logits.derived_copies + (AT_ONCE_COPIES if index in at_once else LOGITS_COPIES)
            step = min(SLICE_BYTES // (4 * (stop - start)), count) * LOGITS_COPIES // copies
            step = max(1, min(step, AT_ONCE_BYTES // (4 * (stop - start))) if index in at_once else step)
            for first in range(0, count, step):
                yield index, slice(first, min(first + step, count)), weight, (start, stop)


def _take_at_once(waiting: _Waiting, rows: slice, weight: torch.Tensor, scale: Scale) -> None:
    """Score some predictions by all their logits, and keep the gradient at their hidden states, times `scale`.

    Both are torch's own, so that they have the bits of the resident model's.
    """
    assert waiting.gradient is not None
    with torch.enable_grad():
        hidden_NH = waiting.hidden[rows].detach().to(weight.device).requires_grad_()
        losses_N = torch.nn.functional.cross_entropy(
            waiting.logits.slice_of(hidden_NH, weight, 0, len(weight)).float(),
            waiting.scores.labels_N[rows],
            reduction="none",
        )
    waiting.scores.set_losses(rows, losses_N.detach())
    (gradient_NH,) = torch.autograd.grad(losses_N, hidden_NH, torch.ones_like(losses_N) * scale)
    waiting.gradient[rows] = gradient_NH.to(waiting.gradient.device, torch.float32)


def _add_gradient(waiting: _Waiting, rows: slice, weight: torch.Tensor, bounds: tuple[int, int], scale: Scale) -> None:
    """Add to the gradient at some hidden states what a slice of the vocabulary gives: (softmax - one hot) W, scaled.

    A `scale` that is a tensor has one value for each prediction (N,).
    """
    assert waiting.gradient is not None
    start, stop = bounds
    with torch.enable_grad():
        hidden_NH = waiting.hidden[rows].detach().to(weight.device).requires_grad_()
        logits_NS = waiting.logits.slice_of(hidden_NH, weight, start, stop)
    gradient_NS = waiting.scores.probabilities(rows, logits_NS.detach())
    labels_N = waiting.scores.labels_N[rows]
    inside_N = ((labels_N >= start) & (labels_N < stop)).to(gradient_NS.dtype)
    places_N = (labels_N - start).clamp(0, stop - start - 1)
    gradient_NS.scatter_add_(1, places_N[:, None], -inside_N[:, None])
    gradient_NS.mul_(scale[rows, None] if isinstance(scale, torch.Tensor) else scale)
    (gradient_NH,) = torch.autograd.grad(logits_NS, hidden_NH, gradient_NS.to(logits_NS.dtype))
    waiting.gradient[rows] += gradient_NH.to(waiting.gradient.device, torch.float32)


class _SlicedLosses(torch.autograd.Function):
    """The cross-entropies (N,) of predictions with deferred logits; forward and backward read the head once each.

    A head that is one slice is read in the forward alone, which takes the gradient of the mean; the backward scales it
    to what it is given. That is exact to the bit for the mean, and for the sum divided by the number of predictions.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, logits: DeferredLogits, labels_N: torch.Tensor) -> torch.Tensor:
        waiting = ctx.waiting = _Waiting(logits, hidden_NH.detach(), TokenScores(labels_N))
        # Autocast computes a loss in float32, whatever the logits are.
        dtype = torch.float32 if torch.is_autocast_enabled(hidden_NH.device.type) else logits.dtype
        ctx.scale_1 = (torch.ones(1, dtype=dtype, device=labels_N.device) / len(labels_N)).float()
        _score({0: waiting}, {0: ctx.scale_1} if ctx.needs_input_grad[0] else {})
        return waiting.scores.losses.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        waiting: _Waiting = ctx.waiting
        if waiting.gradient is not None:
            total_NH = waiting.gradient * (gradient_N.float() / ctx.scale_1)[:, None]
        else:
            _differentiate({0: waiting}, {0: gradient_N.float()})
            total_NH, waiting.gradient = waiting.gradient, None  # another backward may give another scale
        return total_NH.to(waiting.hidden.dtype), None, None


def cross_entropy(input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute `torch.nn.functional.cross_entropy` of deferred logits (N, vocabulary) and labels (N,) by slices.

    Class weights, label smoothing and other shapes need the logits whole: for these it returns NotImplemented.
    """
    ignored, reduction = kwargs.pop("ignore_index", IGNORED), kwargs.pop("reduction", "mean")
    is_plain = not args and all(not value for value in kwargs.values())  # None, or no label smoothing
    if not (is_plain and isinstance(input, DeferredLogits) and input.dim() == 2 and target.dim() == 1):
        return NotImplemented
    counted = target != ignored
    losses_N: torch.Tensor = _SlicedLosses.apply(  # type: ignore[no-untyped-call]
        input.hidden[counted], input, target[counted]
    )
    if reduction == "none":
        return losses_N.new_zeros(len(target)).masked_scatter(counted, losses_N)
    return losses_N.sum() if reduction == "sum" else losses_N.sum() / len(losses_N)


BY_SLICES[torch.nn.functional.cross_entropy] = cross_entropy
