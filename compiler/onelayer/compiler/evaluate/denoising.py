"""The scores of a denoiser: its loss on held-out images at fixed times and noises, the same for every adapter.

Every batch goes through the stream once for each variant of the model: stream index i is batch i // v, variant i % v.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from onelayer.compiler.denoising.batches import DenoisingBatch, NoisyImages, joined_batches
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.evaluate.settings import EvaluateSettings
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.models.unit_memory import scoring_bytes
from onelayer.compiler.streaming.spill import SMALLEST_BYTES
from onelayer.compiler.streaming.stream import Stream

Place = tuple[int, int]  # the number of a batch, and that of an image in it


@dataclass(frozen=True)
class DenoisingScores:
    """The figures of one variant: mean squared errors of its predictions on images of the subject and of the class.

    `drift` is the squared distance of its predictions from the original's, relative to the original's own square, on
    class images if there are any, else on all. It is None for the original.
    """

    loss: float
    class_loss: float | None
    drift: float | None
    images: int


@dataclass
class DenoisingScoring:
    """Collects the predictions of a stream, each process of `team` those of its share of the batches."""

    images: EncodedImages
    batches: Sequence[DenoisingBatch]
    variants: int
    team: Processes
    _errors: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    _moved: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    _squares: dict[int, list[float]] = field(default_factory=dict)
    _originals: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        images: EncodedImages,
        dtype: torch.dtype,
        settings: EvaluateSettings,
        variants: int,
        team: Processes,
    ) -> "DenoisingScoring":
        """Prepare every image at so many times and noises as `settings` say, as many at once where shapes allow it."""
        noisy = NoisyImages(images, dtype)
        batches = [batch for row in range(len(images.rows)) for batch in noisy.held_out(row, settings.noise_samples)]
        return cls(images, joined_batches(batches, settings.batch_size), variants, team)

    def inputs(self) -> list[dict[str, Any]]:
        """Return the denoiser's arguments for every stream index."""
        return [self.batches[place].inputs for place in self._mine for _ in range(self.variants)]

    @property
    def _mine(self) -> list[int]:
        return list(self.team.share(len(self.batches)))

    def take(self, index: int, output: Any) -> None:
        """Take the answer to one batch from one variant. The original's comes before those of the others."""
        number, variant = divmod(index, self.variants)
        place = self._mine[number]
        batch = self.batches[place]
        prediction = batch.prediction(output)
        self._errors[place, variant] = batch.squares(prediction - batch.target.to(prediction.device))
        if variant == 0:
            self._squares[place] = batch.squares(prediction)
            self._originals[place] = prediction
        else:
            self._moved[place, variant] = batch.squares(prediction - self._originals[place])
        if variant == self.variants - 1:
            del self._originals[place]

    def finish(self) -> list[DenoisingScores]:
        """Return the figures of every variant. Raises `FloatingPointError` if one is not finite."""
        parts = self.team.gather((self._errors, self._moved, self._squares))
        for errors, moved, squares in parts:
            self._errors |= errors
            self._moved |= moved
            self._squares |= squares
        return [self._scores(variant) for variant in range(self.variants)]

    def _scores(self, variant: int) -> DenoisingScores:
        places = {False: list[Place](), True: list[Place]()}
        for number, batch in enumerate(self.batches):
            for item, row in enumerate(batch.order):
                places[self.images.rows[row].is_class].append((number, item))
        subject, classes = places[False] or places[True], places[True] if places[False] else []
        loss = self._mean(subject, variant)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: outputs overflow, by the model's weights or by an adapter")
        kept, drift = classes or subject, None
        if variant > 0:
            moved = math.fsum(self._moved[number, variant][item] for number, item in kept)
            squares = math.fsum(self._squares[number][item] for number, item in kept)
            drift = moved / max(squares, torch.finfo(torch.float64).tiny)
        images = len({self.batches[number].order[item] for number, item in subject})
        return DenoisingScores(loss, self._mean(classes, variant) if classes else None, drift, images)

    def _mean(self, places: Sequence[Place], variant: int) -> float:
        return math.fsum(self._errors[number, variant][item] for number, item in places) / len(places)

    def workspace(self, stream: Stream) -> int:
        """Predict what scoring holds in addition to the largest unit; on a host also the batches that wait."""
        streamed, on_gpu = stream.streamed, stream.device.type != "cpu"
        waiting = 0
        if not on_gpu:
            runs = self.variants * len(self._mine)
            states = runs * stream.loads.most_states * max(4, streamed.dtype.itemsize)
            leaves = [leaf for place in self._mine for leaf in tree_leaves(self.batches[place].inputs)]
            given = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            waiting = min(stream.spill_pool.budget_bytes, states + given) + runs * 2 * SMALLEST_BYTES
        return scoring_bytes(streamed.largest_unit_bytes, 0, stream.loads.most_values(streamed), on_gpu) + waiting
