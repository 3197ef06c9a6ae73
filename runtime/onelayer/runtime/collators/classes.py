"""Rows of images or sound in, one batch for a classifier's trainer out; what it reads is made with the batch."""

from collections.abc import Sequence
from typing import Any

import torch

from onelayer.compiler.data.tokens import RowInputs
from onelayer.compiler.errors import InputError
from onelayer.runtime.collators.media import ROW


class ClassCollator:
    """Joins what the processor makes of rows along the first dimension.

    `inputs` are those of all rows that a trainer has, by the number in the column `row`.
    """

    def __init__(self, inputs: Sequence[RowInputs | None]) -> None:
        self.inputs = inputs

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the inputs and the classes (B,). Raises `InputError` for recordings of unequal length."""
        found = (self.inputs[feature[ROW]] for feature in features)
        made = [inputs.tensors() for inputs in found if inputs is not None]
        if len({tuple((name, tensor.shape[1:]) for name, tensor in row.items()) for row in made}) > 1:
            raise InputError(
                "--batch-size: recordings of unequal length make no batch; cut them to one length, or give 1 and "
                "gradient_accumulation_steps"
            )
        inputs = {name: torch.cat([row[name] for row in made]) for name in made[0]}
        return {**inputs, "labels": torch.tensor([feature["labels"] for feature in features])}
