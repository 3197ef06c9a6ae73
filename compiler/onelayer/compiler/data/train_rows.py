"""Rows of tokens in, the large batches of exact steps out: the same in every run with the same seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from onelayer.compiler.data.batches import tokens_digest
from onelayer.compiler.data.classes import Classes
from onelayer.compiler.data.labeled_rows import DataSource, read_for
from onelayer.compiler.data.tokens import AnyTokenizer, Tokens
from onelayer.compiler.machine.console import capped


@dataclass(frozen=True)
class TrainRows:
    """Tokenized training examples, and the order in which steps take them: a new shuffle for every round."""

    rows: Sequence[Tokens]
    batch_size: int
    seed: int

    @classmethod
    def read(
        cls,
        data: DataSource,
        tokenizer: AnyTokenizer,
        max_length: int,
        batch_size: int,
        seed: int,
        classes: Classes | None = None,
    ) -> "TrainRows":
        """Read every labeled example, with an end token as in training; no batch takes an example twice.

        Raises `InputError` if there is none.
        """
        rows = read_for(classes, data, tokenizer, max_length, append_eos=True)
        return cls(rows, capped("--batch-size", batch_size, len(rows)), seed)

    @property
    def digest(self) -> str:
        """The digest of ids and labels, in the order of the data."""
        return tokens_digest(self.rows)

    @property
    def longest(self) -> int:
        """The tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)

    def batch(self, step: int) -> list[Tokens]:
        """Return the examples of a step, counted from 0. They depend only on the step, the rows and the seed."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {turn: self._order(turn) for turn in {place // len(self.rows) for place in places}}
        return [self.rows[orders[place // len(self.rows)][place % len(self.rows)]] for place in places]

    def _order(self, turn: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {turn}").shuffle(order)
        return order
