"""The settings of a refinement, checked."""

import math
from dataclasses import dataclass

from onelayer.compiler.errors import InputError


@dataclass(frozen=True)
class RefineSettings:
    """How to train: `steps` for each unit, of `step_samples` or a few more; the rate is relative to a factor's size."""

    steps: int
    step_samples: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if min(self.steps, self.step_samples) < 1:
            raise InputError("--steps and --step-samples must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--learning-rate {self.learning_rate}: must be above 0, for example 0.01")
