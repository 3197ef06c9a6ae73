"""Arguments of several images in, those of one call of the denoiser out: found by what a pipeline passes on for two.

A joining has the form of the arguments. Tensors are `stacked` along their first dimension or `shared`, and lists that
have an item for each image are `listed`.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

STACKED, SHARED, LISTED = "stacked", "shared", "listed"


class NotJoinedError(ValueError):
    """Arguments that differ where one call has a single value."""


def joining_of(one: Any, two: Any) -> Any:
    """Compare the arguments for one image with those for two. Raises `NotJoinedError` if they have another form."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape == two.shape:
            return SHARED
        if one.ndim and two.shape == (2 * one.shape[0], *one.shape[1:]):
            return STACKED
    elif isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        return {str(key): joining_of(value, two[key]) for key, value in one.items()}
    elif isinstance(one, list | tuple) and type(one) is type(two):
        if len(one) == len(two):
            return [joining_of(*pair) for pair in zip(one, two, strict=True)]
        if len(two) == 2 * len(one):
            return LISTED
    elif type(one) is type(two) and one == two:
        return SHARED
    raise NotJoinedError("the denoiser gets other arguments for two images")


def joined(joining: Any, arguments: Sequence[Any]) -> Any:
    """Return the arguments of one call for several images. Raises `NotJoinedError` for images that do not go together.

    A tensor without dimensions that differs between images (a time) becomes a vector.
    """
    first = arguments[0]
    if joining == STACKED:
        if any(other.shape != first.shape for other in arguments):
            raise NotJoinedError("shapes differ")
        return torch.cat(list(arguments))
    if joining == LISTED:
        return type(first)(chain.from_iterable(arguments))
    if isinstance(first, Mapping):
        return {key: joined(joining[key], [other[key] for other in arguments]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(joined(part, items) for part, *items in zip(joining, *arguments, strict=True))
    if not isinstance(first, torch.Tensor):
        return first
    if all(torch.equal(first, other) for other in arguments):
        return first
    if first.ndim:
        raise NotJoinedError("values differ that all images share")
    return torch.stack(list(arguments))


def parts_of(answer: Any, count: int) -> list[Any]:
    """Return what a denoiser answered for each of `count` images: slices of a tensor, or of a list."""
    if isinstance(answer, torch.Tensor):
        return list(answer.chunk(count))
    size = len(answer) // count
    return [answer[size * number : size * (number + 1)] for number in range(count)]
