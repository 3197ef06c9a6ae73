"""The corrections that are tried if held-out data choose among them. Torch-free."""

import math
from typing import Literal

from onelayer.compiler.results import Result

Solver = Literal["span", "oblique"]
# Limit 0 leaves the adapter as trained; None is the whole correction; span with 3 is the paper's choice.
LIMITS: tuple[tuple[Solver, float | None], ...] = (
    ("span", 0.0), ("span", 1.0), ("span", 3.0), ("span", 10.0), ("span", None),
    ("oblique", 1.0), ("oblique", 3.0), ("oblique", None),
)  # fmt: skip
# An emulator has less energy than its original, and the adapter may have learned to outdo the emulator's errors. So the
# adapter can be too small or too large. Scales are tried without a correction and with the one chosen most often.
SCALES, SCALED = (0.65, 0.8, 0.9, 1.1, 1.2), (("span", 0.0), ("oblique", 1.0))
Trial = tuple[Solver, float | None, float]  # solver, limit, scale
CANDIDATES: tuple[Trial, ...] = (
    *((*limit, 1.0) for limit in LIMITS),
    *((*limit, scale) for limit in LIMITS if limit in SCALED for scale in SCALES),
)

# Fewer held-out rows than these choose by chance.
FEW_ROWS = 100
# So many rows decide which corrections can win; FIRST_SHARE of all rows if that is more. FINALISTS run over all rows.
FIRST_ROWS, FIRST_SHARE, FINALISTS = 32, 1 / 8, 4


def first_rows(rows: int) -> int:
    """Return how many of `rows` held-out rows every correction runs over; all if the others would save little."""
    first = max(FIRST_ROWS, math.ceil(rows * FIRST_SHARE))
    return first if 2 * first <= rows else rows


def runs_per_row(rows: int, first: int) -> float:
    """Return how often the original runs over each of `rows` rows on average, if all corrections run over `first`.

    It runs once without a correction. Variants that are still the same count, although they share a run.
    """
    return 1 + (len(CANDIDATES) * first + FINALISTS * (rows - first)) / rows


class CorrectionSettings(Result):
    """The choices that determine a correction: limit 0 leaves the adapter as trained, None means no limit.

    `scale` multiplies what the adapter adds to the original.
    """

    solver: Solver
    limit: float | None
    scale: float


class Candidate(CorrectionSettings):
    """Settings that were tried, and their held-out loss over `rows` rows: all, or the first share if they fell out."""

    loss: float
    rows: int
