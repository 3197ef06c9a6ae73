"""Reads what a pass calibrates on, with the loss's labels if gradients flow back."""

from typing import Protocol

from onelayer.compiler.data.classes import Classes, predicted_classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows, read_tokens
from onelayer.compiler.data.tokens import AnyTokenizer, Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.models.streamed_model import StreamedModel


class Sampled(Protocol):
    """How many examples a pass reads, how long, drawn by which seed."""

    @property
    def samples(self) -> int:
        """The number of examples."""

    @property
    def max_length(self) -> int:
        """The tokens at which examples are cut."""

    @property
    def seed(self) -> int:
        """The seed of the draw."""


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
