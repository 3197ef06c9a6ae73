"""Short rows packed into long ones: which go together, and whether a model keeps the rows of a pack apart.

A pack is one row to the model, with positions that start over at every row; from these transformers makes masks
that let no row see another (`find_packed_sequence_indices` in masking_utils). Not every model goes by them, so each is
tried before its first step.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from onelayer.compiler.data.tokens import IGNORED, Tokens

Pack = list[Tokens]


def packs_of(rows: Sequence[Tokens], max_length: int) -> list[Pack]:
    """The rows in packs of at most `max_length` tokens: longest first, each where the least room is left (best fit)."""
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # room left in a pack and its place, in order
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        found = bisect_left(rooms, (length, 0))
        if found < len(rooms):
            room, place = rooms.pop(found)
        else:
            room, place = max_length, len(packs)
            packs.append([])
        packs[place].append(row)
        insort(rooms, (room - length, place))
    return packs


def join_rows(pack: Pack) -> Tokens:
    """A pack as one row; the first token of each of its rows is predicted from nothing, as it is alone."""
    return Tokens(
        [token for row in pack for token in row.input_ids],
        [label for row in pack for label in (IGNORED, *row.labels[1:])],
        [position for row in pack for position in range(len(row.input_ids))],
    )
