"""Rows of one recording and its transcript in, one batch for the trainer of an encoder-decoder out."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from onelayer.compiler.data.batches import decoder_inputs
from onelayer.compiler.data.row_inputs import joined_media
from onelayer.compiler.data.tokens import IGNORED, RowInputs
from onelayer.runtime.collators.media import padded, rows_of


class TranscriptCollator:
    """Joins what the processor makes of recordings, and pads what the decoder reads and writes on the right.

    `inputs` are those of all rows that a trainer has, by the number in the column `row`. The decoder is causal, so no
    position sees the padding after it.
    """

    def __init__(self, inputs: Sequence[RowInputs | None], config: PreTrainedConfig) -> None:
        self.inputs, self.config = inputs, config

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the inputs, and what the decoder reads and its labels (B, T), where position t predicts label t."""
        written = [feature["labels"] for feature in features]
        length = max(map(len, written))
        read = [decoder_inputs(labels, self.config) for labels in written]
        return {
            **joined_media(rows_of(self.inputs, features)),
            "decoder_input_ids": padded(read, length, read[0][0]),
            "labels": padded(written, length, IGNORED),
        }
