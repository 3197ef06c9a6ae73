"""The loss of a pass, by what its batches are: of tokens (`token_loss.py`), or of the noise in images."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from onelayer.compiler.data.batches import TokenBatch
from onelayer.compiler.denoising.batches import DenoisingBatch
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.token_loss import TokenLoss

PassBatch = TokenBatch | DenoisingBatch


class DenoisingLoss:
    """The mean of the images' losses, in float32, used like `TokenLoss`.

    The first `trained` batches form one mean, whose gradients go back; the others form another, which is only measured.
    """

    def __init__(
        self, batches: Sequence[DenoisingBatch], trained: int, device: torch.device, team: Processes | None = None
    ) -> None:
        self.team = team or Processes()
        self.places, self.trained = self.team.share_of_both(trained, len(batches) - trained)
        self.batches = [batches[place] for place in self.places]
        self.device = device
        self.trained_tokens = sum(batch.positions for batch in batches[:trained])
        images = [len(batch.weights) for batch in batches]
        self._counts = sum(images[:trained]), sum(images[trained:])
        self._losses: dict[int, float] = {}
        self._means: list[float | None] = [None, None]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The denoiser's arguments for every batch of this process."""
        return [batch.inputs for batch in self.batches]

    @property
    def loss(self) -> float:
        """Mean over the images trained on."""
        assert self._means[0] is not None
        return self._means[0]

    @property
    def held_out_loss(self) -> float | None:
        """Mean over the images that are only scored; None if there are none."""
        return self._means[1]

    def take(self, index: int, output: Any) -> None:
        """Score the answer to one batch, and send its gradient back if it is trained on."""
        with torch.set_grad_enabled(index < self.trained):
            loss = self.batches[index].loss(output)
            self._losses[index] = float(loss.detach())
            if index < self.trained and loss.requires_grad and math.isfinite(self._losses[index]):
                # Code after the last unit may share a graph with code before other units, which is still to be walked.
                (loss / self._counts[0]).backward(retain_graph=True)

    def finish(self) -> bool:
        """Fill in the means; return False if a loss is not finite."""
        mine = [self._losses[index] for index in range(len(self.batches))]
        found = self.team.gather((mine[: self.trained], mine[self.trained :]))
        for part, count in enumerate(self._counts):
            self._means[part] = math.fsum(value for both in found for value in both[part]) / count if count else None
        return all(mean is None or math.isfinite(mean) for mean in self._means)


def loss_of(
    batches: Sequence[PassBatch],
    trained: int,
    device: torch.device,
    team: Processes | None = None,
    pool: SpillPool | None = None,
) -> TokenLoss | DenoisingLoss:
    """Return the loss of a pass over these batches, which are all of one kind; `pool` holds what waits."""
    images = [batch for batch in batches if isinstance(batch, DenoisingBatch)]
    if images:
        return DenoisingLoss(images, trained, device, team)
    return TokenLoss([batch for batch in batches if isinstance(batch, TokenBatch)], trained, device, team, pool)
