"""The adapter of a renewal, in checkpoints: a resumed run finds with it the offsets that an undisturbed one has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FILE = "anchored_by.safetensors"


@dataclass(frozen=True)
class Renewal:
    """A renewal before the optimizer step after `step`, with the trained values by name, on the host."""

    step: int
    adapter: Mapping[str, torch.Tensor]

    def save(self, checkpoint: Path) -> None:
        """Write it into the directory of a checkpoint whose next step uses offsets of this renewal."""
        save_file(dict(self.adapter), checkpoint / FILE, {"step": str(self.step)})

    @classmethod
    def load(cls, checkpoint: Path) -> "Renewal | None":
        """Read it; None if the step after the checkpoint begins with a renewal."""
        if not (checkpoint / FILE).is_file():
            return None
        with safe_open(checkpoint / FILE, framework="pt") as file:
            return cls(int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
