"""Splitting a call by rows: which arguments have rows, and what cannot be split."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from onelayer.runtime.streamed.rows import join_rows, rows_of, split_rows, tokens_per_row

IDS = torch.arange(24).reshape(4, 6)
STATES = torch.randn(4, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"input_ids": IDS, "attention_mask": torch.ones(4, 1, 6, 6)}, 4),
        ({"inputs_embeds": STATES, "position_ids": IDS[:1], "use_cache": False}, 4),
        ({"hidden": STATES, "cache_position": torch.arange(6)}, 4),
        ({"hidden": STATES, "cache_position": torch.arange(4)}, None),  # of as many values as rows: whose are they?
        ({"input_ids": IDS, "position_ids": torch.zeros(3, 4, 6, dtype=torch.long)}, None),
        ({"input_ids": IDS, "pixel_values": torch.zeros(5, 3, 8, 8)}, None),
        ({"input_ids": IDS, "past_key_values": DynamicCache()}, None),
        ({"input_ids": IDS, "other": None, "sizes": [1, 2, 3]}, 4),
        ({}, None),
    ],
)
def test_the_rows_of_a_call_are_found_or_it_is_not_split(arguments: dict[str, Any], rows: int | None) -> None:
    assert rows_of(arguments) == rows


def test_pieces_share_what_has_no_rows_and_join_to_the_whole() -> None:
    arguments = {"ids": IDS, "positions": IDS[:1], "places": torch.arange(6), "flag": True}
    pieces = split_rows(arguments, 4, 3)
    assert [len(piece["ids"]) for piece in pieces] == [3, 1]
    assert all(torch.equal(piece["positions"], IDS[:1]) and piece["flag"] is True for piece in pieces)
    assert torch.equal(join_rows([(piece["ids"], None) for piece in pieces], [3, 1], "Model")[0], IDS)


def test_a_result_without_rows_cannot_be_joined() -> None:
    with pytest.raises(RuntimeError, match=r"Model returns a tensor of shape \(\) .* set micro_batch_size"):
        join_rows([torch.tensor(1.0), torch.tensor(2.0)], [3, 1], "Model")


def test_tokens_are_counted_on_the_longest_side() -> None:
    other = {"decoder_input_ids": torch.zeros(4, 9), "mask": torch.ones(4, 1, 6, 6)}
    assert tokens_per_row({"input_ids": IDS, **other}) == 9
    assert tokens_per_row({"pixel_values": torch.zeros(2, 3, 32, 32)}) == 12
