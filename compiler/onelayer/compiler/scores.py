"""Cross-entropy and accuracy of next-token predictions, from logits that come by slices of the vocabulary. Pure.

Shape letters: N predicted tokens, S a slice of the vocabulary.
"""

import torch


class TokenScores:
    """Log-sum-exp, label logit and best token of N predictions, updated slice by slice, in float32 and better.

    loss = sum of next-token cross-entropies over the labelled tokens / their number.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        """`labels` (N,) are token ids."""
        self.labels_N = labels
        count, device = len(labels), labels.device
        self._highest_N = torch.full((count,), -torch.inf, device=device)
        self._sum_N = torch.zeros(count, dtype=torch.float64, device=device)
        self._label_logit_N = torch.zeros(count, device=device)
        self._best_N = torch.zeros(count, dtype=torch.long, device=device)

    def update(self, rows: slice, logits_NS: torch.Tensor, start: int) -> None:
        """Take in the logits of the tokens `start`, `start` + 1, ... for the predictions in `rows`."""
        logits_NS = logits_NS.to(torch.float32)
        highest_N, best_N = logits_NS.max(dim=-1)
        before_N = self._highest_N[rows]
        # Strictly greater: among equals the first token wins, as it does in an argmax over the whole.
        self._best_N[rows] = torch.where(highest_N > before_N, best_N + start, self._best_N[rows])
        now_N = torch.maximum(before_N, highest_N)
        grown_N = (logits_NS - now_N[:, None]).exp().sum(dim=-1, dtype=torch.float64)
        self._sum_N[rows] = self._sum_N[rows] * (before_N - now_N).double().exp() + grown_N
        self._highest_N[rows] = now_N
        inside_N = (self.labels_N[rows] >= start) & (self.labels_N[rows] < start + logits_NS.shape[1])
        picked_N = logits_NS.gather(1, (self.labels_N[rows] - start).clamp(0, logits_NS.shape[1] - 1)[:, None])[:, 0]
        self._label_logit_N[rows] = torch.where(inside_N, picked_N, self._label_logit_N[rows])

    @property
    def loss_sum(self) -> float:
        """Sum of the cross-entropies in nats."""
        return float((self._highest_N.double() + self._sum_N.log() - self._label_logit_N.double()).sum())

    @property
    def correct(self) -> int:
        """How many labels are the most likely token."""
        return int((self._best_N == self.labels_N).sum())
