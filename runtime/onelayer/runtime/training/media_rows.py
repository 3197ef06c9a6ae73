"""Rows of images or sound in, one batch out: what a classifier reads is made when the batch is taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onelayer.compiler.errors import InputError


def joined_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Make the inputs of rows (`made`, `labels`) and join them along the first dimension.

    Raises `InputError` for rows of unequal shapes.
    """
    made = [row["made"].tensors() for row in rows]
    if len({tuple((name, tensor.shape[1:]) for name, tensor in row.items()) for row in made}) > 1:
        raise InputError(
            "--batch-size: recordings of unequal length make no batch; cut them to one length, or give 1 and "
            "gradient_accumulation_steps"
        )
    inputs = {name: torch.cat([row[name] for row in made]) for name in made[0]}
    return {**inputs, "labels": torch.tensor([row["labels"] for row in rows])}
