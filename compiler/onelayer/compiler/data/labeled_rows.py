"""Reads a data set, tokenizes it and drops rows without a label, for every pass and for training."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onelayer.compiler.data.classes import Classes, tokenize_for
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import AnyTokenizer, Tokens, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.sources.data_set import DataSource as DataSource
from onelayer.compiler.sources.data_set import names_of


def tell_cut(max_length: int, total: int, cut: int, skipped: int) -> None:
    """Print a notice if some of all examples are cut at a length, or left out for it."""
    if cut or skipped:
        left_out = f"; {skipped} have no labeled token and are left out" if skipped else ""
        notice(f"--max-length {max_length}: {cut} of {total} examples are longer and are cut{left_out}")


@dataclass(frozen=True)
class LabeledRows:
    """The labeled rows of a data set in its order. `skipped` had no label within `max_length`; `cut` are longer."""

    rows: list[tuple[Example, Tokens]]
    skipped: int
    cut: int
    max_length: int

    @property
    def tokens(self) -> list[Tokens]:
        """The tokens of the rows."""
        return [tokens for _, tokens in self.rows]

    def tell(self) -> None:
        """Print a notice if rows are cut or left out."""
        tell_cut(self.max_length, len(self.rows) + self.skipped, self.cut, self.skipped)


def labeled_rows(
    data: DataSource,
    tokenize_row: Callable[[Example], Sequence[Tokens]],
    max_length: int,
    samples: int | None = None,
    seed: int = 0,
) -> LabeledRows:
    """Return the labeled rows in the order of the data, and how many were dropped and cut.

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
            f"{names_of(data)}: no example has a labeled token within --max-length {max_length}; raise it, or give "
            "examples of two tokens or more"
        )
    return LabeledRows(kept, len(rows) - len(kept), sum(tokens.cut for _, tokens in rows), max_length)


def read_tokens(
    data: DataSource, tokenizer: AnyTokenizer, max_length: int, samples: int | None = None, seed: int = 0
) -> list[Tokens]:
    """Read the tokens of the labeled rows of `data`, drawn by `labeled_rows`, for any model."""
    return labeled_rows(
        data, lambda example: [tokenize(example, tokenizer, max_length)], max_length, samples, seed
    ).tokens


def read_for(
    classes: Classes | None,
    data: DataSource,
    tokenizer: AnyTokenizer,
    max_length: int,
    append_eos: bool = False,
) -> list[Tokens]:
    """Read the tokens of the labeled rows of `data` for a model that predicts `classes`, or tokens."""
    labeled = labeled_rows(
        data, lambda example: [tokenize_for(classes, example, tokenizer, max_length, append_eos)], max_length
    )
    labeled.tell()
    return labeled.tokens
