"""Seeded mutations of documents and bytes: a valid one and a generator in, one with a few faults out."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values of every kind that no field expects, or that only look right.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "none", "-1", "1e400", "../../etc/passwd", "/dev/zero", "a\x00b", "\ud800", "${HOME}", "x" * 100_000,
    [], [[]], {}, {"": None}, [0] * 1000, [None], {"a": {"b": {}}},
)  # fmt: skip
MARKS = (
    *'{}[],:"\\\n\t#0',
    "- ", "&a ", "*a", "!!int ", "!!timestamp ", "!!binary ", "!!set ", "<<: ", "? ", "--- ", "2001-99-99", "1:99",
    "[" * 3000, "9" * 5000, "\ufeff",
)  # fmt: skip


def mutated_document(document: Any, generator: random.Random) -> Any:
    """Copy a JSON-like document with one to three places changed."""
    changed = [copy.deepcopy(document)]  # in a list, so that the whole can be replaced too
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        owner, key = generator.choice(places)
        _change(owner, key, places, generator)
        if not changed:
            return None
    return changed[0]


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], generator: random.Random) -> None:
    kind = generator.choice(("odd", "odd", "odd", "drop", "swap", "nest", "grow", "rename"))
    if kind == "drop":
        del owner[key]
    elif kind == "swap":
        other, place = generator.choice(places)
        owner[key] = copy.deepcopy(other[place])
    elif kind == "nest":
        for _ in range(generator.choice((1, 3, 200))):
            owner[key] = generator.choice(([owner[key]], {"x": owner[key]}))
    elif kind == "grow" and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] = owner[key] * generator.choice((-1, 2, 1000, 10**12)) + generator.choice((-1, 0, 1))
    elif kind == "rename" and isinstance(owner, dict):
        owner[f"{key}_"] = owner.pop(key)
    else:
        owner[key] = copy.deepcopy(generator.choice(ODD_VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """List every place of a document, as its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def mutated_bytes(data: bytes, generator: random.Random) -> bytes:
    """Copy bytes with one changed, a piece cut out or doubled, or something inserted."""
    start = generator.randrange(len(data))
    stop = min(len(data), start + generator.choice((1, 2, 20, len(data))))
    return data[:start] + generator.choice((
        b"",
        data[start:stop] * 2,
        bytes(generator.randrange(256) for _ in range(stop - start)) if stop - start < 100 else b"\xff\x00",
        generator.choice(MARKS).encode() + data[start:],
    )) + generator.choice((data[stop:], data[stop:], b""))  # fmt: skip


def mutated_json(document: Any, generator: random.Random) -> bytes:
    """Write a document as JSON with a fault in its values or in its text."""
    if generator.random() < 0.3:
        return mutated_bytes(json.dumps(document).encode(), generator)
    text = json.dumps(mutated_document(document, generator))  # NaN and Infinity bare, as Python writes them
    return text.encode("utf-8", "surrogatepass")
