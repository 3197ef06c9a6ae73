"""Held-out data in, the samples that are scored out: rows, or the choices of questions."""

from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedConfig

from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.classes import Classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import AnyTokenizer, Tokens, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import names_of


@dataclass(frozen=True)
class Question:
    """A multiple-choice example: the samples of its choices in order, and the number of the right choice."""

    samples: range
    answer: int


@dataclass(frozen=True)
class Pair:
    """A preference: the samples of the better and of the worse answer; None for one that is not given."""

    better: int | None
    worse: int | None


@dataclass(frozen=True)
class Samples:
    """Held-out data, tokenized. `counted[i]`: the loss counts sample i; wrong choices only compete with right ones.

    Rejected and undesirable answers do not count either.
    """

    tokens: list[Tokens]
    counted: list[bool]
    questions: list[Question]
    pairs: list[Pair]

    @classmethod
    def read(
        cls, data: DataSource, tokenizer: AnyTokenizer, max_length: int, classes: Classes | None = None
    ) -> "Samples":
        """Read all examples of `data` for a model that predicts `classes`, or tokens.

        Raises `InputError` if nothing is left to count, or choices cannot be compared.
        """

        def tokenize_row(example: Example) -> list[Tokens]:
            if example.rejected is not None and classes is None:
                both = [tokenize(text, tokenizer, max_length) for text in (example, example.with_rejected())]
                return both if all(row.labeled for row in both) else []
            if example.choices is None or classes is not None:
                return [tokenize_for(classes, example, tokenizer, max_length)]
            return _choices(example, tokenizer, max_length)

        labeled = labeled_rows(data, tokenize_row, max_length)
        labeled.tell()
        samples = cls(labeled.tokens, [], [], [])
        for _, group in groupby(labeled.rows, key=lambda row: id(row[0])):
            same = [example for example, _ in group]
            example, first, count = same[0], len(samples.counted), len(same)
            if example.is_preference:
                samples.counted.extend([example.desirable is not False, *[False] * (count - 1)])
                lone = (first, None) if example.desirable else (None, first)
                samples.pairs.append(Pair(first, first + 1) if example.rejected is not None else Pair(*lone))
            elif example.answer is None or classes is not None:
                samples.counted.append(True)
            else:
                samples.counted.extend(number == example.answer for number in range(count))
                samples.questions.append(Question(range(first, first + count), example.answer))
        if not any(samples.counted):
            raise InputError(f"{names_of(data)}: no answer is desirable, so there is no loss; add some that are")
        return samples

    def batches(self, config: PreTrainedConfig, batch_size: int) -> list[TokenBatch]:
        """Make batches of the samples, with which the model can be called."""
        return make_batches(self.tokens, config, batch_size)


def _choices(example: Example, tokenizer: AnyTokenizer, max_length: int) -> list[Tokens]:
    """Tokenize every choice of an example. Raises `InputError` if a choice does not fit or is empty."""
    rows = []
    for number, choice in enumerate(example.choices or ()):
        # A truncated choice would win because it is shorter, so a choice must fit as a whole.
        tokens = tokenize(example.with_choice(number), tokenizer, max_length + 1)
        if len(tokens.input_ids) > max_length:
            raise InputError(
                f"{example.source}: with choice {number} it has more than {max_length} tokens; raise --max-length"
            )
        if not tokens.labeled:
            raise InputError(f"{example.source}: choice {number} ({choice!r}) has no token of its own; reword it")
        rows.append(tokens)
    return rows
