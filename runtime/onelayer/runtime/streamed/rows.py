"""Splits the arguments of a call by rows, and joins the results: a batch in, micro-batches out, and back.

Row, here, is one example of a batch: the first dimension of its tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from onelayer.compiler.models.deferred_logits import DeferredLogits

# Values of an image that become one patch at most: one of 16 x 16 pixels, in one channel.
PATCH_VALUES = 256


def rows_of(arguments: Any) -> int | None:
    """Return how many rows a call's arguments have; None if they cannot be split by rows.

    They can if each tensor of two or more dimensions has the same number of rows, or one row for all. A tensor of one
    dimension is shared, unless it has just as many values as there are rows. An integer tensor of three dimensions
    (positions in time, height and width) has its rows elsewhere. What is no tensor and no plain value (a cache) holds
    rows that nothing here can see.
    """
    leaves = tree_leaves(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not all(leaf is None or isinstance(leaf, torch.Tensor | int | float | str | torch.dtype) for leaf in leaves):
        return None
    counts = {len(tensor) for tensor in tensors if tensor.dim() >= 2}
    rows = max(counts, default=0)
    if not rows or not counts <= {1, rows}:
        return None
    if any(tensor.dim() == 3 and not tensor.is_floating_point() for tensor in tensors):
        return None
    return None if rows > 1 and any(tensor.shape == (rows,) for tensor in tensors) else rows


def tokens_per_row(arguments: Any) -> int:
    """Estimate how many tokens a row of a call is: of its longest sequence, or patches of an image."""
    sizes = [1]
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and tensor.dim() in (2, 3):
            sizes.append(tensor.shape[1])
        elif isinstance(tensor, torch.Tensor) and tensor.dim() > 3 and tensor.shape[1] > 1:
            sizes.append(tensor[0].numel() // PATCH_VALUES)
    return max(sizes)


def split_rows(arguments: Any, rows: int, size: int) -> list[Any]:
    """Split arguments of so many rows into pieces of at most `size`."""

    def piece(start: int) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: _part(tensor, rows, start, start + size), arguments)

    return [piece(start) for start in range(0, rows, size)]


def _part(tensor: torch.Tensor, rows: int, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop] if tensor.dim() >= 2 and len(tensor) == rows else tensor


def join_rows(outputs: Sequence[Any], counts: Sequence[int], name: str) -> Any:
    """Join the results of pieces of so many rows each. Raises `RuntimeError` if one has no rows.

    `name` is what was called.
    """
    if len(outputs) == 1:
        return outputs[0]
    flat = [tree_flatten(output) for output in outputs]
    leaves = []
    for parts in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(parts[0], torch.Tensor):
            leaves.append(parts[0])
            continue
        # A router gives its logits by tokens, row after row.
        per_row = len(parts[0]) // counts[0] if parts[0].dim() else 0
        if not per_row or any(len(part) != per_row * count for part, count in zip(parts, counts, strict=True)):
            raise RuntimeError(
                f"{name} returns a tensor of shape {tuple(parts[0].shape)} for {counts[0]} rows, which cannot be "
                "joined; set micro_batch_size to the size of the batch"
            )
        joined = torch.cat([part.hidden if isinstance(part, DeferredLogits) else part for part in parts])
        leaves.append(parts[0].over_other(joined) if isinstance(parts[0], DeferredLogits) else joined)
    return tree_unflatten(leaves, flat[0][1])
