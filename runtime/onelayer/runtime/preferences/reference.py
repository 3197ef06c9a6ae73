"""The reference of a training: made before by a step of its own, or by the training itself, once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from onelayer.compiler.data.preferences import PreferenceMethod
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.reference import REFERENCE_FILE, Reference, score_rows
from onelayer.compiler.evaluate.settings import EvaluateSettings
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.results import Report
from onelayer.compiler.storage.files import write_json
from onelayer.runtime.preferences.rows import Row, answers_of, with_reference


def given_reference(directory: Path, base_digest: str) -> Reference:
    """Read a reference that `reference_scores` made. Raises `InputError` if another original gave it."""
    reference = Reference.open(directory)
    if reference.base_digest != base_digest:
        raise InputError(f"{directory / REFERENCE_FILE}: is of another original than the emulator; make it again")
    return reference


def referenced_rows(
    sets: Sequence[list[Row]],
    method: PreferenceMethod,
    reference: Reference | None,
    original: Path | None,
    work: Path,
    device: str | None,
) -> tuple[list[list[Row]], Report | None]:
    """Return the sets of rows with log-probabilities of their answers, if a reference or the original can give them.

    The original scores the answers of all sets in one pass. The report says what that cost, if it was not done before.
    """
    report = None
    if reference is None:
        if original is None:
            return list(sets), None
        answers = {key: row for rows in sets for key, row in answers_of(rows, method).items()}
        reference, report = _own_reference(work, original, answers, device)
    return [with_reference(rows, method, reference) for rows in sets], report


def _own_reference(
    work: Path, original: Path, answers: Mapping[str, Tokens], device: str | None
) -> tuple[Reference, Report | None]:
    """Score the answers under the original and keep the result in `work`; an interrupted run finds it there.

    There is no report of what was scored before. One of several processes does it for all.
    """

    def score() -> tuple[Reference, Report | None]:
        if (work / REFERENCE_FILE).is_file():
            return Reference.open(work), None
        reference, report = score_rows(original, answers, EvaluateSettings(device=device))
        write_json(work / REFERENCE_FILE, reference.model_dump(mode="json"))
        return reference, report

    return processes().by_first(score)
