"""Compresses activations in a training run: the rank, chosen or remembered, and figures from the first batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.activations.compression import compress_activations
from onelayer.runtime.activations.figures import Figures
from onelayer.runtime.activations.probe import Loss, choose_rank, gradient_report, report
from onelayer.runtime.activations.report import ActivationReport
from onelayer.runtime.training.settings import TrainSettings

RANK_FILE = "activation_rank.json"


class TrainActivations:
    """The compression on a trainer's model. A measured rank is kept in `work`, so a resumed run uses it too."""

    def __init__(self, model: nn.Module, settings: TrainSettings, work: Path) -> None:
        assert settings.activations != "none"
        rank: Any = settings.activation_rank
        self._file = work / RANK_FILE
        self._choosing = rank == "auto" and not self._file.is_file()
        self._reporting = settings.activation_report
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._compression = compress_activations(
            model, rank=0.5 if rank == "auto" else rank, where=settings.activations, seed=settings.seed
        )
        if rank == "auto" and self._file.is_file():
            self._compression.rank = read_json(self._file)["rank"]
        self.measured: ActivationReport | None = None

    @property
    def wants_first_batch(self) -> bool:
        """Whether the first batch is still needed to choose the rank or to compare gradients."""
        return self._choosing or self._reporting

    def measure_first_batch(self, loss: Loss) -> None:
        """Choose the rank and compare gradients with the loss of the first batch, if requested."""
        if self._choosing:
            write_json(self._file, {"rank": choose_rank(self._compression, self._parameters, loss)})
        if self._reporting:
            self.measured = gradient_report(self._compression, self._parameters, loss)
        self._choosing = self._reporting = False

    @contextmanager
    def counted(self) -> Iterator[Figures]:
        """Count what compression keeps inside the `with` block; the count is the report if no other was requested."""
        with self._compression.measure(with_errors=False) as figures:
            yield figures
        if self.measured is None:
            self.measured = report(self._compression, figures, None)
