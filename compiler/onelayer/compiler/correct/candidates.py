"""The corrections that are tried if held-out data choose among them. Torch-free."""

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
CANDIDATES: tuple[tuple[Solver, float | None, float], ...] = (
    *((*limit, 1.0) for limit in LIMITS),
    *((*limit, scale) for limit in LIMITS if limit in SCALED for scale in SCALES),
)


class CorrectionSettings(Result):
    """The choices that determine a correction: limit 0 leaves the adapter as trained, None means no limit.

    `scale` multiplies what the adapter adds to the original.
    """

    solver: Solver
    limit: float | None
    scale: float


class Candidate(CorrectionSettings):
    """Settings that were tried, and their held-out loss."""

    loss: float
