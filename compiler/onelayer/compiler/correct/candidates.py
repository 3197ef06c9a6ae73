"""The corrections that are tried if held-out data choose among them. Torch-free."""

from typing import Literal

from onelayer.compiler.results import Result

Solver = Literal["span", "oblique"]
# Limit 0 leaves the adapter as trained; None is the whole correction; span with 3 is the paper's choice.
LIMITS: tuple[tuple[Solver, float | None], ...] = (
    ("span", 0.0), ("span", 1.0), ("span", 3.0), ("span", 10.0), ("span", None),
    ("oblique", 1.0), ("oblique", 3.0), ("oblique", None),
)  # fmt: skip
# An emulator has less energy than its original, and what it gets wrong the adapter may have learnt to outdo: so the
# adapter can come out too small or too large. Tried with no correction and with the one that is chosen most often.
SCALES, SCALED = (0.65, 0.8, 0.9, 1.1, 1.2), (("span", 0.0), ("oblique", 1.0))
CANDIDATES: tuple[tuple[Solver, float | None, float], ...] = (
    *((*limit, 1.0) for limit in LIMITS),
    *((*limit, scale) for limit in LIMITS if limit in SCALED for scale in SCALES),
)


class CorrectionSettings(Result):
    """What decides a correction; limit 0 leaves the adapter as trained, None is no limit.

    What the adapter adds to the original is multiplied by `scale`.
    """

    solver: Solver
    limit: float | None
    scale: float


class Candidate(CorrectionSettings):
    """One that was tried, and its held-out loss."""

    loss: float
