"""Reads what a pass calibrates on, with the loss's labels if gradients flow back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from onelayer.compiler.data.batches import make_batches, tokens_digest
from onelayer.compiler.data.classes import Classes, predicted_classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows, read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import AnyTokenizer, Tokens
from onelayer.compiler.denoising.batches import NoisyImages
from onelayer.compiler.denoising.encoded import encoded_images
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.denoising_loss import PassBatch


class Sampled(Protocol):
    """How many examples a pass reads, how long, drawn by which seed."""

    @property
    def samples(self) -> int:
        """The number of examples."""

    @property
    def max_length(self) -> int:
        """The tokens at which examples are cut."""

    @property
    def max_image_pixels(self) -> int | None:
        """The pixels to which larger images of rows are scaled down."""

    @property
    def batch_size(self) -> int:
        """The number of examples that are computed at once."""

    @property
    def seed(self) -> int:
        """The seed of the draw."""


@dataclass(frozen=True)
class Calibration:
    """What a pass calibrates on. `digest` identifies it, `positions` counts tokens or pixels of all samples.

    `backward` tells whether gradients of the loss can flow back.
    """

    batches: Sequence[PassBatch]
    digest: str
    samples: int
    positions: int
    backward: bool


def read_calibration(
    streamed: StreamedModel, calibration: DataSource, settings: Sampled, *, backward: bool
) -> Calibration:
    """Read the calibration data of a model: text, or encoded images at times that cover the axis of times evenly.

    Raises `InputError` for data of another kind.
    """
    directory = streamed.checkpoint.directory
    if streamed.library.DENOISES:
        images = encoded_images(calibration, directory)
        noisy = NoisyImages(images, streamed.dtype, settings.seed)
        batches = noisy.stratified(list(range(len(images.rows))), settings.samples)
        positions = sum(batch.positions for batch in batches)
        return Calibration(batches, images.digest, len(batches), positions, backward)
    tokenizer = load_reader(directory, type(streamed.model), settings.max_image_pixels)
    tokens, backward = calibration_tokens(streamed, calibration, tokenizer, settings, backward=backward)
    made = make_batches(tokens, streamed.config, settings.batch_size)
    positions = sum(len(item.input_ids) for item in tokens)
    return Calibration(made, tokens_digest(tokens), len(tokens), positions, backward)


def calibration_tokens(
    streamed: StreamedModel,
    calibration: DataSource,
    tokenizer: AnyTokenizer,
    settings: Sampled,
    *,
    backward: bool,
) -> tuple[list[Tokens], bool]:
    """Read the calibration data, and whether gradients flow back: without a loss they cannot, which is said.

    A classifier learns from rows with a label only.
    """
    if backward:
        try:
            classes = predicted_classes(type(streamed.model), streamed.config, streamed.checkpoint.directory)
            return _with_labels(classes, calibration, tokenizer, settings), True
        except InputError as error:
            notice(f"--backward: {error}; errors are weighted by what flows forward alone")
    return read_tokens(calibration, tokenizer, settings.max_length, settings.samples, settings.seed), False


def _with_labels(
    classes: Classes | None, calibration: DataSource, tokenizer: AnyTokenizer, settings: Sampled
) -> list[Tokens]:
    if classes is None:
        return read_tokens(calibration, tokenizer, settings.max_length, settings.samples, settings.seed)
    length = settings.max_length
    return labeled_rows(
        calibration,
        lambda example: [tokenize_for(classes, example, tokenizer, length)],
        length,
        settings.samples,
        settings.seed,
    ).tokens
