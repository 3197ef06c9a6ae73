"""Cross-entropy, accuracy and divergence of next-token predictions, from slices of the vocabulary's logits. Pure.

Shape letters: N predicted tokens, S a slice of the vocabulary.
"""

import torch

from onelayer.compiler.models.unit_memory import COMPARED_VALUES


class TokenScores:
    """Log-sum-exp, label logit and best token of N predictions, updated by slices, in float32 or better."""

    def __init__(self, labels: torch.Tensor) -> None:
        """Start without logits; `labels` (N,) are token ids."""
        self.labels_N = labels
        count, device = len(labels), labels.device
        self._highest_N = torch.full((count,), -torch.inf, device=device)
        self._sum_N = torch.zeros(count, dtype=torch.float64, device=device)
        self._label_logit_N = torch.zeros(count, device=device)
        self.best_N = torch.zeros(count, dtype=torch.long, device=device)

    def update(self, rows: slice, logits_NS: torch.Tensor, start: int) -> None:
        """Add the logits of the tokens `start`, `start` + 1, ... for the predictions in `rows`."""
        logits_NS = logits_NS.to(torch.float32)
        highest_N, best_N = logits_NS.max(dim=-1)
        before_N = self._highest_N[rows]
        # The comparison is strict: among equals the first token wins, as in an argmax over all tokens.
        self.best_N[rows] = torch.where(highest_N > before_N, best_N + start, self.best_N[rows])
        now_N = torch.maximum(before_N, highest_N)
        grown_N = (logits_NS - now_N[:, None]).exp_().sum(dim=-1, dtype=torch.float64)
        self._sum_N[rows] = self._sum_N[rows] * (before_N - now_N).double().exp() + grown_N
        self._highest_N[rows] = now_N
        inside_N = (self.labels_N[rows] >= start) & (self.labels_N[rows] < start + logits_NS.shape[1])
        picked_N = logits_NS.gather(1, (self.labels_N[rows] - start).clamp(0, logits_NS.shape[1] - 1)[:, None])[:, 0]
        self._label_logit_N[rows] = torch.where(inside_N, picked_N, self._label_logit_N[rows])

    def set_losses(self, rows: slice, losses_N: torch.Tensor) -> None:
        """Set the cross-entropies of the predictions in `rows`, instead of their logits; best tokens stay unknown."""
        self._highest_N[rows], self._sum_N[rows] = 0.0, 1.0
        self._label_logit_N[rows] = -losses_N

    @property
    def log_sums(self) -> torch.Tensor:
        """The logarithm of the sum of the exponentials of all logits."""
        return self._highest_N.double() + self._sum_N.log()

    def probabilities(self, rows: slice, logits_NS: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of a slice of tokens, once all slices were added; float32, as softmax rounds it."""
        highest_N = self._highest_N[rows]
        shift_N = self._sum_N[rows].log().to(torch.float32)
        return (logits_NS.to(torch.float32) - highest_N[:, None]).sub_(shift_N[:, None]).exp_()

    @property
    def losses(self) -> torch.Tensor:
        """The cross-entropies in nats, float64."""
        return self.log_sums - self._label_logit_N.double()

    @property
    def hits(self) -> torch.Tensor:
        """Booleans (N,): the label is the most likely token."""
        return self.best_N == self.labels_N


class Divergence:
    """The Kullback-Leibler divergence of N predictions of one model (q) from those of another (p), by slices.

    KL(p || q) = sum p (z_p - z_q) - log-sum-exp z_p + log-sum-exp z_q, with z the logits.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._highest_N = torch.full((count,), -torch.inf, device=device)
        self._weight_N = torch.zeros(count, dtype=torch.float64, device=device)
        self._weighted_N = torch.zeros(count, dtype=torch.float64, device=device)

    def update(self, rows: slice, p_logits_NS: torch.Tensor, q_logits_NS: torch.Tensor) -> None:
        """Add the same slice of both models' logits for the predictions in `rows`, a few rows at a time."""
        step, begin = max(1, COMPARED_VALUES // p_logits_NS.shape[1]), rows.start or 0
        for first in range(0, len(p_logits_NS), step):
            last = min(first + step, len(p_logits_NS))
            self._update(slice(begin + first, begin + last), p_logits_NS[first:last], q_logits_NS[first:last])

    def _update(self, rows: slice, p_logits_NS: torch.Tensor, q_logits_NS: torch.Tensor) -> None:
        p_NS, q_NS = p_logits_NS.double(), q_logits_NS.double()
        before_N = self._highest_N[rows]
        now_N = torch.maximum(before_N, p_NS.amax(dim=-1).float())
        weights_NS = (p_NS - now_N[:, None].double()).exp_()
        # A token that the first model excludes does not count, whatever the second model predicts.
        gaps_NS = torch.where(weights_NS > 0, p_NS - q_NS, 0.0)
        shrink_N = (before_N - now_N).double().exp()
        self._weight_N[rows] = self._weight_N[rows] * shrink_N + weights_NS.sum(dim=-1)
        self._weighted_N[rows] = self._weighted_N[rows] * shrink_N + (weights_NS * gaps_NS).sum(dim=-1)
        self._highest_N[rows] = now_N

    def divergences(self, p: TokenScores, q: TokenScores) -> torch.Tensor:
        """Compute divergences in nats, from the scores of both models over the same slices; never below zero."""
        return (self._weighted_N / self._weight_N - p.log_sums + q.log_sums).clamp_min(0.0)
