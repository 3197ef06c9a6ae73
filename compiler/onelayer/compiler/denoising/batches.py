"""Encoded images in, batches that a denoiser can be called with out. A batch is one image, or several of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.denoising.joining import NotJoinedError, joined, parts_of
from onelayer.compiler.denoising.layout import Layout
from onelayer.compiler.denoising.noise import NoiseProcess
from onelayer.compiler.denoising.settings import Weighting

PROMPTS_HELD = 8
SEED_STEP = 1_000_003  # seeds of neighboring runs have no row in common


@dataclass(frozen=True)
class DenoisingBatch:
    """Noisy images: the arguments of the denoiser, what it should answer (B, ...), and the weight of each image's loss.

    `answer` finds the prediction for one image in what the denoiser returns. `order` has the numbers of the images,
    `positions` are those of all together. `joining` says how the arguments of more images are joined.
    """

    inputs: dict[str, Any]
    target: torch.Tensor
    weights: tuple[float, ...]
    answer: Layout
    positions: int
    order: tuple[int, ...]
    joining: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """The number of images, and the positions of one."""
        return len(self.order), self.positions // len(self.order)

    def loss(self, output: Any) -> torch.Tensor:
        """Compute the sum of the images' weighted mean squared errors, in float32; gradients flow back."""
        predictions = self.prediction(output).chunk(len(self.weights))
        targets = self.target.to(predictions[0].device).chunk(len(self.weights))
        parts = zip(self.weights, predictions, targets, strict=True)
        return torch.stack([weight * (one - wanted).square().mean() for weight, one, wanted in parts]).sum()

    def prediction(self, output: Any) -> torch.Tensor:
        """Return what an answer predicts (B, ...), in float32 and in the layout of the target."""
        tensors = output.sample if hasattr(output, "sample") else output
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors
        return torch.cat([self.answer.forward(part).float() for part in parts_of(tensors, len(self.weights))])

    def squares(self, values: torch.Tensor) -> list[float]:
        """Compute the mean square of values (B, ...) for each image."""
        return [float(part.square().mean()) for part in values.chunk(len(self.order))]


def joined_batches(batches: Sequence[DenoisingBatch], most: int) -> list[DenoisingBatch]:
    """Join batches of one image into batches of at most `most`, of those that one call of the denoiser takes."""
    groups: list[list[DenoisingBatch]] = []
    for batch in batches:
        group = next((group for group in groups if len(group) < most and go_together(group[0], batch)), None)
        if group is None:
            groups.append([batch])
        else:
            group.append(batch)
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def go_together(one: DenoisingBatch, other: DenoisingBatch) -> bool:
    """Whether one call of the denoiser takes the images of both."""
    if one.joining is None or one.positions != other.positions:
        return False
    try:
        joined(one.joining, [one.inputs, other.inputs])
    except NotJoinedError:
        return False
    return True


def _joined(batches: Sequence[DenoisingBatch]) -> DenoisingBatch:
    return replace(
        batches[0],
        inputs=joined(batches[0].joining, [batch.inputs for batch in batches]),
        target=torch.cat([batch.target for batch in batches]),
        weights=tuple(weight for batch in batches for weight in batch.weights),
        positions=sum(batch.positions for batch in batches),
        order=tuple(number for batch in batches for number in batch.order),
    )


class NoisyImages:
    """Encoded images with noise; which noise depends on the numbers alone, so that every run sees the same.

    `weighting` and `prior_weight` are those of training.
    """

    def __init__(
        self,
        images: EncodedImages,
        dtype: torch.dtype,
        seed: int = 0,
        weighting: Weighting = "none",
        prior_weight: float = 1.0,
    ) -> None:
        self.images, self.dtype, self.seed, self.prior_weight = images, dtype, seed, prior_weight
        self._process: NoiseProcess = images.process(weighting)
        # Rows of one prompt share its tensors.
        self._template = lru_cache(PROMPTS_HELD)(images.template_of)

    def at(self, row: int, place: float, number: int) -> DenoisingBatch:
        """Return an image at a place in 0..1 on the axis of times, with the noise of that number."""
        return self._batch(row, place, self._generator(number))

    @property
    def positions(self) -> int:
        """The most positions of an image."""
        prompts = {row.prompt for row in self.images.rows}
        return max(self._template(prompt).positions for prompt in prompts)

    def drawn(self, row: int, number: int) -> DenoisingBatch:
        """Return an image at a time that is drawn as in training; class images have the weight `prior_weight`."""
        weight = self.prior_weight if self.images.rows[row].is_class else 1.0
        generator = self._generator(number)
        batch = self._batch(row, self._process.drawn(generator), generator)
        return replace(batch, weights=tuple(weight * each for each in batch.weights))

    def stratified(self, rows: list[int], count: int) -> list[DenoisingBatch]:
        """Return `count` batches whose times cover the axis evenly; images take turns."""
        places = [(number + 0.5) / count for number in range(count)]
        order = torch.randperm(count, generator=self._generator(0)).tolist()
        return [self.at(rows[number % len(rows)], places[order[number]], number + 1) for number in range(count)]

    def held_out(self, row: int, count: int) -> list[DenoisingBatch]:
        """Return one image at `count` times that cover the axis evenly, each with its own noise."""
        return [self.at(row, (number + 0.5) / count, row * count + number + 1) for number in range(count)]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * SEED_STEP + number)

    def _batch(self, row: int, place: float, generator: torch.Generator) -> DenoisingBatch:
        noisy = self._process.noisy(self.images.latent(row), place, generator)
        template = self._template(self.images.rows[row].prompt)
        inputs = template.arguments(noisy.sample, noisy.time, self.dtype)
        answer, joining = self.images.answer, self.images.form.joining
        return DenoisingBatch(inputs, noisy.target, (noisy.weight,), answer, template.positions, (row,), joining)


@dataclass(frozen=True)
class DrawnImages:
    """The order in which training takes images; which image and which noise depend on the number and the seed alone.

    Images of the subject are taken in a new order in every round. With class images, every second one is of the class,
    as in DreamBooth (arXiv 2208.12242).
    """

    noisy: NoisyImages
    batch_size: int

    @property
    def digest(self) -> str:
        """The digest of the images."""
        return self.noisy.images.digest

    def row(self, number: int) -> int:
        """Return which image is the one of this number."""
        images = self.noisy.images
        classes = images.numbers(is_class=True) if self.noisy.prior_weight else []
        subject = images.numbers(is_class=False) or classes
        if not classes:
            return self._taken(subject, number)
        return self._taken(classes if number % 2 else subject, number // 2)

    def _taken(self, rows: list[int], turn: int) -> int:
        generator = torch.Generator().manual_seed(self.noisy.seed * SEED_STEP + turn // len(rows))
        return rows[int(torch.randperm(len(rows), generator=generator)[turn % len(rows)])]

    def batch(self, number: int) -> DenoisingBatch:
        """Return an image with the noise of its number."""
        return self.noisy.drawn(self.row(number), number + 1)

    def step(self, step: int) -> list[DenoisingBatch]:
        """Return the images of a step, counted from 0."""
        return [self.batch(number) for number in range(step * self.batch_size, (step + 1) * self.batch_size)]
