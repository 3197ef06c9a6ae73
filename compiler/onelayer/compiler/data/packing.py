"""Packs short rows into long ones.

A pack is one row to the model, with positions that start again at 0 for each of its rows. transformers makes masks from
these positions so that no row sees another (`find_packed_sequence_indices` in masking_utils). Not every model uses
them, so each model is tested before its first step.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from onelayer.compiler.data.tokens import IGNORED, Tokens

Pack = list[Tokens]


def packs_of(rows: Sequence[Tokens], max_length: int) -> list[Pack]:
    """Put rows into packs of at most `max_length` tokens: longest first, each where least room is left (best fit)."""
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # the room left in a pack and its index, sorted
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        tightest = bisect_left(rooms, (length, 0))
        if tightest < len(rooms):
            room, place = rooms.pop(tightest)
        else:
            room, place = max_length, len(packs)
            packs.append([])
        packs[place].append(row)
        insort(rooms, (room - length, place))
    return packs


def join_rows(pack: Pack) -> Tokens:
    """Join a pack to one row; nothing predicts the first token of each of its rows, as in a row alone."""
    return Tokens(
        [token for row in pack for token in row.input_ids],
        [label for row in pack for label in (IGNORED, *row.labels[1:])],
        [position for row in pack for position in range(len(row.input_ids))],
    )
