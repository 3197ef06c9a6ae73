"""A row with a chosen and a rejected answer in, the same row with a prompt of its own out."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from onelayer.compiler.errors import InputError


def with_prompt(row: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return a row with `chosen` and `rejected` with its prompt as a field of its own, and any other row unchanged.

    Published sets hold whole conversations in both: what they begin with alike is the prompt.
    """
    if not {"chosen", "rejected"} & row.keys():
        return row
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if name not in row:
            raise InputError(f"{source}: field '{other}' needs a field '{name}' too; add it")
    both = [row["chosen"], row["rejected"]]
    if both[0] == both[1]:
        raise InputError(f"{source}: fields 'chosen' and 'rejected' are equal; remove the row")
    if isinstance(row.get("prompt"), list) or not all(isinstance(answer, list) and answer for answer in both):
        return row
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False)))
    shared = min(alike, *(len(answer) - 1 for answer in both))
    if shared == 0:
        return row
    return {**row, "prompt": both[0][:shared], "chosen": both[0][shared:], "rejected": both[1][shared:]}
