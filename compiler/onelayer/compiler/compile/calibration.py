"""Reads what a compile calibrates on, with the loss's labels if gradients flow back."""

from typing import TYPE_CHECKING

from onelayer.compiler.compile.settings import ResolvedSettings
from onelayer.compiler.data.classes import Classes, predicted_classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows, read_tokens
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.models.streamed_model import StreamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_tokens(
    streamed: StreamedModel,
    calibration: DataSource,
    tokenizer: "PreTrainedTokenizerBase",
    settings: ResolvedSettings,
) -> tuple[list[Tokens], ResolvedSettings]:
    """Read the calibration data, and the settings without `backward` if it has no loss, which is said.

    A classifier learns from rows with a label only.
    """
    length, samples, seed = settings.max_length, settings.samples, settings.seed
    if settings.backward:
        try:
            classes = predicted_classes(type(streamed.model), streamed.config, streamed.checkpoint.directory)
            return _with_labels(classes, calibration, tokenizer, settings), settings
        except InputError as error:
            notice(f"--backward: {error}; errors are weighted by what flows forward alone")
            settings = settings.model_copy(update={"backward": False})
    return read_tokens(calibration, tokenizer, length, samples, seed), settings


def _with_labels(
    classes: Classes | None, calibration: DataSource, tokenizer: "PreTrainedTokenizerBase", settings: ResolvedSettings
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
