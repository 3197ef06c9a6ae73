"""One call of an original unit, as a refinement keeps it: what it read, what it gave, what came back."""

from dataclasses import dataclass
from typing import Any

import torch

from onelayer.compiler.factors.moments import finite_rows, row_count
from onelayer.compiler.streaming.recorded_outputs import Recorded
from onelayer.compiler.streaming.unit_boundary import Slots, UnitInputs, differentiable


@dataclass(frozen=True)
class Call:
    """One call of the original unit for some samples: its inputs and its output tensors, on the host.

    `finite` has a mask (rows,) for each target, true for rows that are entirely finite; None if all rows are.
    `gradients` are those of the loss at the outputs; empty if they are not known, or not finite. `asked` is what the
    unit has to record inside, which counts as outputs.
    """

    samples: int
    kept: UnitInputs
    targets: list[torch.Tensor]
    versions: list[int]
    finite: list[torch.Tensor | None]
    gradients: Slots
    asked: Recorded | None = None

    @classmethod
    def of(
        cls,
        samples: int,
        kept: UnitInputs,
        outputs: Any,
        gradients: Slots | None = None,
        asked: Recorded | None = None,
    ) -> "Call":
        """Keep the outputs together with the kept inputs."""
        targets = [output.detach() for output in differentiable(outputs)]
        finite = [finite_rows(target) for target in targets]
        known = [gradient for gradient in gradients or () if gradient is not None]
        usable = bool(known) and all(bool(torch.isfinite(gradient).all()) for gradient in known)
        kept_gradients = list(gradients or ()) if usable and finite == [None] * len(finite) else []
        return cls(samples, kept, targets, [target._version for target in targets], finite, kept_gradients, asked)

    @property
    def tensors(self) -> list[Any]:
        """What a step takes to the device."""
        return [self.kept.arguments, self.targets, self.finite, self.gradients]

    @property
    def rows(self) -> int:
        """The number of rows of all targets."""
        return sum(map(row_count, self.targets))

    @property
    def dropped_rows(self) -> int:
        """The number of rows that are not finite."""
        return sum(int((~mask).sum()) for mask in self.finite if mask is not None)

    @property
    def weight(self) -> float:
        """The number of samples, multiplied by the share of rows that are finite."""
        return self.samples * (1 - self.dropped_rows / max(1, self.rows))

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if the model's code changed an input or an output in place after the call."""
        self.kept.check_unchanged()
        if self.versions != [target._version for target in self.targets]:
            raise RuntimeError("an output was changed in place after the unit returned it, so it cannot be learned")
