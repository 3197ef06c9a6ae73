"""Rows with images or audio in, one padded batch for a trainer out; pixels and features are made with the batch."""

from collections.abc import Sequence
from typing import Any

import torch

from onelayer.compiler.data.row_inputs import padded_tensors
from onelayer.compiler.data.tokens import IGNORED, RowInputs

ROW = "row"  # the column with the place of a row's other inputs


class MediaCollator:
    """Pads token rows on the right, and lets the processor make what else the model reads of them together.

    `inputs` are those of all rows that a trainer has, by the number in the column `row`.
    """

    def __init__(self, inputs: Sequence[RowInputs | None], pad_token_id: int) -> None:
        self.inputs, self.pad_token_id = inputs, pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ids, labels and mask (B, T), and the inputs of the rows' media."""
        length = max(len(feature["input_ids"]) for feature in features)
        text = {
            "input_ids": padded([feature["input_ids"] for feature in features], length, self.pad_token_id),
            "attention_mask": padded([[1] * len(feature["input_ids"]) for feature in features], length, 0),
            "labels": padded([feature["labels"] for feature in features], length, IGNORED),
        }
        return {**text, **padded_tensors([self.inputs[feature[ROW]] for feature in features], length)}


def rows_of(inputs: Sequence[RowInputs | None], features: Sequence[dict[str, Any]]) -> list[RowInputs]:
    """Return the inputs of some rows that all have some."""
    found = [inputs[feature[ROW]] for feature in features]
    return [item for item in found if item is not None]


def padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """Return rows (B, length) that are padded on the right."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
