"""The state that survives a killed polish: adapter, optimizer and history after every finished step, in one file.

The file is written aside and renamed, so it always holds the whole state of one finished step.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onelayer.compiler.machine.transfers import on_host
from onelayer.compiler.models.unit_memory import ADAPTER_COPIES
from onelayer.compiler.storage.safetensors_format import read_header
from onelayer.compiler.storage.safetensors_writer import tensor_entry, write_safetensors
from onelayer.compiler.storage.work_directory import WorkKind

STATE_FILE = "state.safetensors"
POLISH_WORK = WorkKind("polish", finished=STATE_FILE)
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = dict[str, nn.Parameter]


@dataclass
class PolishState:
    """Trained parameters by name, their state in AdamW, and the history so far.

    `steps` are the figures of finished steps. `best` are the parameters of the lowest held-out loss, `best_loss`.
    `gradient_cosine` is the cost of compressing unit inputs, if they are compressed.
    """

    parameters: Parameters
    optimizer: torch.optim.AdamW
    steps: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_loss: float | None = None
    gradient_cosine: float | None = None

    @property
    def bytes(self) -> int:
        """Memory of the parameters, their gradients, the optimizer's two moments and the best copy."""
        return ADAPTER_COPIES * sum(
            parameter.numel() * parameter.element_size() for parameter in self.parameters.values()
        )

    @property
    def history(self) -> dict[str, Any]:
        """Figures of the finished steps and the held-out losses so far."""
        return {"steps": self.steps, "held_out": self.held_out, "gradient_cosine": self.gradient_cosine}

    def measured(self, loss: float) -> None:
        """Note the held-out loss of the present parameters; keep a copy of them if it is the lowest so far."""
        self.held_out.append({"step": len(self.steps), "loss": loss})
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def chosen(self) -> dict[str, torch.Tensor]:
        """Return the parameters to publish: the best measured, or the last if none were."""
        return self.best or {name: parameter.detach() for name, parameter in self.parameters.items()}

    def save(self, directory: Path) -> None:
        """Write everything to `directory`, in place of the previous state."""
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS if parameter in self.optimizer.state else ():
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        entries = [tensor_entry(name, tensor) for name, tensor in on_host(tensors).items()]
        history = {**self.history, "best_loss": self.best_loss}
        write_safetensors(directory / STATE_FILE, entries, {"history": json.dumps(history)})

    def restore(self, directory: Path) -> bool:
        """Load what `save` wrote; return False if there is nothing yet."""
        from safetensors import safe_open

        path = directory / STATE_FILE
        if not path.is_file():
            return False
        _, metadata = read_header(path)
        history = json.loads(metadata["history"])
        self.steps, self.held_out, self.best_loss = history["steps"], history["held_out"], history["best_loss"]
        self.gradient_cosine = history["gradient_cosine"]
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for name, parameter in self.parameters.items():
                device = parameter.device
                parameter.data = file.get_tensor(f"parameter.{name}").to(device)
                if f"best.{name}" in keys:
                    self.best[name] = file.get_tensor(f"best.{name}").to(device)
                if f"{MOMENTS[0]}.{name}" in keys:
                    moments = {moment: file.get_tensor(f"{moment}.{name}").to(device) for moment in MOMENTS}
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(len(self.steps))), **moments}
        return True
