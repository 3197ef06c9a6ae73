"""Reads a data set, tokenizes it and drops rows without a label, for every pass and for training."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.compiler.data.classes import Classes, tokenize_for
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import Tokens, tokenize
from onelayer.compiler.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataSource = str | Path | Sequence[str | Path]


def labeled_rows(
    data: DataSource,
    tokenize_row: Callable[[Example], Sequence[Tokens]],
    max_length: int,
    samples: int | None = None,
    seed: int = 0,
) -> tuple[list[tuple[Example, Tokens]], int]:
    """Return the labeled rows in the order of the data, and the number of dropped ones.

    An example may become several rows. `samples` examples are drawn with a private generator; None takes all. Raises
    `InputError` if no row is left.
    """
    examples = read_examples(data)
    if samples is not None and samples < len(examples):
        examples = random.Random(seed).sample(examples, samples)
    rows = [(example, tokens) for example in examples for tokens in tokenize_row(example)]
    kept = [(example, tokens) for example, tokens in rows if tokens.labeled]
    if not kept:
        raise InputError(
            f"{data}: no example has a labeled token within --max-length {max_length}; raise it, or give examples of "
            "two tokens or more"
        )
    return kept, len(rows) - len(kept)


def read_tokens(
    data: DataSource, tokenizer: "PreTrainedTokenizerBase", max_length: int, samples: int | None = None, seed: int = 0
) -> list[Tokens]:
    """Read the tokens of the labeled rows of `data`, drawn by `labeled_rows`, for any model."""
    rows, _ = labeled_rows(data, lambda example: [tokenize(example, tokenizer, max_length)], max_length, samples, seed)
    return [tokens for _, tokens in rows]


def read_for(
    classes: Classes | None,
    data: DataSource,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    append_eos: bool = False,
) -> list[Tokens]:
    """Read the tokens of the labeled rows of `data` for a model that predicts `classes`, or tokens."""
    rows, _ = labeled_rows(
        data, lambda example: [tokenize_for(classes, example, tokenizer, max_length, append_eos)], max_length
    )
    return [tokens for _, tokens in rows]
