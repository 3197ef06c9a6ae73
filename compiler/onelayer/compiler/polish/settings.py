"""The settings of exact steps, checked."""

import math
from dataclasses import dataclass

from onelayer.compiler.errors import InputError


@dataclass(frozen=True)
class PolishSettings:
    """What a person chose, checked; everything here can change the adapter."""

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    max_gradient_norm: float
    max_length: int
    eval_steps: int
    activations: int | float | None
    seed: int
    packing: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.micro_batch_size, self.max_length, self.eval_steps) < 1:
            raise InputError(
                "--steps, --batch-size, --micro-batch-size, --max-length, --eval-steps: must be at least 1"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"--warmup-steps {self.warmup_steps}: must lie between 0 and --steps {self.steps}")
        if self.activations is not None and not (
            self.activations >= 1 if isinstance(self.activations, int) else 0 < self.activations < 1
        ):
            raise InputError(f"--activations {self.activations}: must be a number of rows, or a share between 0 and 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"--learning-rate {self.learning_rate}: must be a number greater than 0")
        if not self.max_gradient_norm > 0:
            raise InputError(f"--max-gradient-norm {self.max_gradient_norm}: must be greater than 0; inf is no limit")

    def learning_rate_at(self, step: int) -> float:
        """Linear up over the warm-up, then linear down to zero behind the last step (Trainer's default schedule)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        return self.learning_rate * (self.steps - step) / (self.steps - self.warmup_steps)
