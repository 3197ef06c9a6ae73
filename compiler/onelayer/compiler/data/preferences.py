"""Rows of preferences in, token rows for preference tuning out, and the rows whose log-probabilities it needs.

A preference is a prompt with a chosen and a rejected answer (DPO, arXiv 2305.18290), or with one answer that is
desirable or not (KTO, arXiv 2402.01306). Prompt and answers are told apart as in every other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from onelayer.compiler.data.batches import tokens_digest
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import IGNORED, AnyTokenizer, Tokens, tokenize
from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import DataSource, names_of

PreferenceMethod = Literal["dpo", "kto"]
FORMS: dict[PreferenceMethod, str] = {
    "dpo": "'prompt' with 'chosen' and 'rejected'",
    "kto": "'prompt' with 'completion' and a 'label' of true or false, or 'prompt' with 'chosen' and 'rejected'",
}


@dataclass(frozen=True)
class Preference:
    """Token ids of a prompt and its answers: the chosen and the rejected one, or one that is desirable or not.

    `cut` says whether an answer was longer than the limit.
    """

    prompt_ids: list[int]
    answers: tuple[list[int], ...]
    desirable: bool | None = None
    cut: bool = False

    def rows(self, *others: list[int]) -> list[Tokens]:
        """Return the prompt with each of its answers, and with `others`; answers are labeled."""
        return [answered(self.prompt_ids, answer) for answer in (*self.answers, *others)]


def answered(prompt_ids: list[int], answer: list[int]) -> Tokens:
    """Return a prompt with a labeled answer."""
    return Tokens([*prompt_ids, *answer], [*[IGNORED] * len(prompt_ids), *answer])


def preferences_of(
    example: Example, method: PreferenceMethod, tokenizer: AnyTokenizer, max_length: int
) -> list[Preference]:
    """Tokenize one row for a method; KTO takes a pair as two rows. Empty if an answer has no token within the limit.

    Raises `InputError` for a row without a preference, or with one that the method does not take.
    """
    is_pair = example.rejected is not None
    if not is_pair and (example.desirable is None or method == "dpo"):
        raise InputError(f"{example.source}: --method {method} needs {FORMS[method]}; change the row, or the method")
    texts = [example, *([example.with_rejected()] if is_pair else [])]
    rows = [tokenize(text, tokenizer, max_length, append_eos=True) for text in texts]
    if not all(row.labeled for row in rows):
        return []
    starts = [next(index for index, label in enumerate(row.labels) if label != IGNORED) for row in rows]
    shared = _common([row.input_ids[:start] for row, start in zip(rows, starts, strict=True)])
    answers = tuple(row.input_ids[shared:] for row in rows)
    prompt_ids = rows[0].input_ids[:shared]
    if method == "dpo":
        return [Preference(prompt_ids, answers, cut=any(row.cut for row in rows))]
    labels = (True, False) if is_pair else (bool(example.desirable),)
    return [
        Preference(prompt_ids, (answer,), label, row.cut)
        for answer, label, row in zip(answers, labels, rows, strict=True)
    ]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with: a token may join the end of a prompt and the start of an answer."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


def mismatched_answers(preferences: Sequence[Preference], batch_size: int) -> list[list[int]]:
    """Return for every row the answer of the row before it in its batch, by which KTO estimates a divergence.

    Batches are the `batch_size` rows in order, as the trainer takes them; the first row gets the answer of the last.
    """
    found = []
    for start in range(0, len(preferences), batch_size):
        batch = preferences[start : start + batch_size]
        found += [batch[index - 1].answers[0] for index in range(len(batch))]
    return found


def row_key(row: Tokens) -> str:
    """Return the digest of one row, under which its log-probability is stored."""
    return tokens_digest([row])


def read_preferences(
    data: DataSource, method: PreferenceMethod, tokenizer: AnyTokenizer, max_length: int
) -> tuple[list[Preference], int]:
    """Read the preferences of `data` in order, and count the rows that the limit leaves without an answer.

    Raises `InputError` if none is left.
    """
    examples = read_examples(data)
    found = [preferences_of(example, method, tokenizer, max_length) for example in examples]
    kept = [item for items in found for item in items]
    if not kept:
        raise InputError(f"{names_of(data)}: no example has an answer within --max-length {max_length}; raise it")
    return kept, sum(not items for items in found)
