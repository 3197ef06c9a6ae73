"""Rows of images or sound in, one batch for a classifier's trainer out; what it reads is made with the batch."""

from collections.abc import Sequence
from typing import Any

import torch

from onelayer.compiler.data.row_inputs import joined_media
from onelayer.compiler.data.tokens import RowInputs
from onelayer.runtime.collators.media import rows_of


class ClassCollator:
    """Joins what the processor makes of rows along the first dimension.

    `inputs` are those of all rows that a trainer has, by the number in the column `row`.
    """

    def __init__(self, inputs: Sequence[RowInputs | None]) -> None:
        self.inputs = inputs

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the inputs and the classes (B,). Raises `InputError` for recordings that make no batch."""
        inputs = joined_media(rows_of(self.inputs, features))
        return {**inputs, "labels": torch.tensor([feature["labels"] for feature in features])}
