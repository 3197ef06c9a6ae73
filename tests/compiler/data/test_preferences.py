"""Rows of preferences: which forms are read, how prompt and answers are told apart, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from helpers.tiny_models import save_tiny
from onelayer.compiler.data.preferences import Preference, answered, mismatched_answers, preferences_of
from onelayer.compiler.data.rows import example_from_row, of_one_kind
from onelayer.compiler.data.tokens import IGNORED, load_tokenizer
from onelayer.compiler.errors import InputError

ASKED = {"role": "user", "content": "what is the sum"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("it is five", "rome"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("preferences")
    save_tiny("llama", folder / "model")
    return load_tokenizer(folder / "model")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "what is the sum", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
)
def test_whole_conversations_are_split_at_their_first_difference(row: dict[str, Any]) -> None:
    example = example_from_row(row, "here")
    assert (example.prompt, example.completion, example.rejected) == ([ASKED], [GOOD], [BAD])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'chosen' needs a field 'rejected' too"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": "b", "rejected": "c"}, "field 'chosen' needs a field 'prompt' too"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected' is empty"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "'prompt' is a string and 'chosen' is a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}, "ambiguous"),
    ],
)
def test_refusals(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        example_from_row(row, "here")


def test_preferences_and_other_rows_are_kept_apart() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(InputError, match="1: has a 'label' and 0 has none; keep them apart"):
        list(of_one_kind(example_from_row(row, str(number)) for number, row in enumerate(rows)))


def test_prompt_and_answers_are_those_of_other_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "what is the sum", "chosen": " it is five", "rejected": " rome"}
    (pair,) = preferences_of(example_from_row(row, "here"), "dpo", tokenizer, 100)
    assert pair.prompt_ids == tokenizer(row["prompt"])["input_ids"]
    for answer, text in zip(pair.answers, (row["chosen"], row["rejected"]), strict=True):
        ids = [*tokenizer(row["prompt"] + text)["input_ids"], tokenizer.eos_token_id]
        assert [*pair.prompt_ids, *answer] == ids
    assert pair.rows()[1].labels == [*[IGNORED] * len(pair.prompt_ids), *pair.answers[1]]
    lone = preferences_of(example_from_row(row, "here"), "kto", tokenizer, 100)
    assert [(item.answers, item.desirable) for item in lone] == [
        ((pair.answers[0],), True),
        ((pair.answers[1],), False),
    ]
    assert preferences_of(example_from_row(row, "here"), "dpo", tokenizer, len(pair.prompt_ids)) == []


def test_each_prompt_gets_the_answer_before_it_in_its_batch() -> None:
    preferences = [Preference([number], ([10 + number],), True) for number in range(5)]
    assert mismatched_answers(preferences, 2) == [[11], [10], [13], [12], [14]]
    assert answered([1], [2]).labels == [IGNORED, 2]
