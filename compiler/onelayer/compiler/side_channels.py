"""Containers that units fill for units behind them (shared keys and values): opened before a call, read after it.

A unit that writes into an argument has an output that it does not return, and one that reads there has an input that is
not passed by itself. Opened, the contents lie beside the arguments, where they are kept and cut like any other tensor.
"""

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, EncoderDecoderCache

CACHES = (Cache, EncoderDecoderCache)

Contents = list[dict[Any, Any]]


def containers_of(arguments: Any) -> list[UserDict[Any, Any]]:
    """The containers among some arguments, each once. Plain dicts are trees to torch, and rebuilt wherever they go."""
    found = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, UserDict)}
    return list(found.values())


def opened(arguments: Any) -> tuple[Any, Contents]:
    """Arguments, and what lies in their containers now."""
    return arguments, [dict(container) for container in containers_of(arguments)]


def closed(arguments: Any, contents: Contents) -> tuple[Any, list[UserDict[Any, Any]]]:
    """The arguments with containers of their own that hold `contents`, and these.

    A cache that some models make against their configuration is handed out anew and empty, as it was: a unit that runs
    twice would find its own keys and values in it.
    """
    originals = containers_of(arguments)
    fresh = [type(container)(content) for container, content in zip(originals, contents, strict=True)]
    by_identity: dict[int, Any] = dict(zip(map(id, originals), fresh, strict=True))

    def own(leaf: Any) -> Any:
        return copy.deepcopy(leaf) if isinstance(leaf, CACHES) else by_identity.get(id(leaf), leaf)

    return tree_map(own, arguments), fresh


def written(containers: list[UserDict[Any, Any]], contents: Contents) -> Contents:
    """What a call put into the containers that were closed over `contents`."""
    return [
        {name: value for name, value in container.items() if value is not before.get(name)}
        for container, before in zip(containers, contents, strict=True)
    ]


def called(run: Callable[[Any, Any], Any], arguments: Any, contents: Contents) -> tuple[Any, Contents]:
    """What `run(args, kwargs)` returns, with containers closed over `contents`, and what it put into them."""
    (args, kwargs), containers = closed(arguments, contents)
    returned = run(args, kwargs)
    return returned, written(containers, contents)


def delivered(arguments: Any, outputs: tuple[Any, Contents]) -> Any:
    """What a call returned; what it put into containers goes into those of `arguments`."""
    returned, side_outputs = outputs
    for container, found in zip(containers_of(arguments), side_outputs, strict=True):
        container.update(found)
    return returned
