"""Preferences in, the rows of TRL's trainers out, with log-probabilities of the original where a reference has them.

TRL reads `prompt_ids` and a column of ids for each answer, and takes the reference from a column of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from onelayer.compiler.data.preferences import Preference, PreferenceMethod, answered, mismatched_answers, row_key
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.evaluate.reference import Reference

Row = dict[str, Any]
# The columns of ids that a method reads, and the columns of their log-probabilities under the reference.
COLUMNS: dict[PreferenceMethod, dict[str, str]] = {
    "dpo": {"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"},
    "kto": {"completion_ids": "ref_logps", "KL_completion_ids": "ref_KL_logps"},
}


def trainer_rows(preferences: Sequence[Preference], method: PreferenceMethod, batch_size: int) -> list[Row]:
    """Return one row for each preference, in order; KTO's also hold the answer of another row of their batch."""
    if method == "dpo":
        return [
            {"prompt_ids": item.prompt_ids, "chosen_ids": item.answers[0], "rejected_ids": item.answers[1]}
            for item in preferences
        ]
    others = mismatched_answers(preferences, batch_size)
    return [
        {
            "prompt_ids": item.prompt_ids,
            "completion_ids": item.answers[0],
            "KL_completion_ids": other,
            "label": item.desirable,
        }
        for item, other in zip(preferences, others, strict=True)
    ]


def answers_of(rows: Sequence[Row], method: PreferenceMethod) -> dict[str, Tokens]:
    """Map every answer of the rows by its digest, each once."""
    found = (answered(row["prompt_ids"], row[name]) for row in rows for name in COLUMNS[method])
    return {row_key(tokens): tokens for tokens in found}


def with_reference(rows: Sequence[Row], method: PreferenceMethod, reference: Reference) -> list[Row]:
    """Return the rows with the log-probabilities of their answers. Raises `InputError` if one is not known."""
    known: Mapping[str, float] = reference.of(answers_of(rows, method))
    return [
        {
            **row,
            **{
                log_probability: known[row_key(answered(row["prompt_ids"], row[name]))]
                for name, log_probability in COLUMNS[method].items()
            },
        }
        for row in rows
    ]
