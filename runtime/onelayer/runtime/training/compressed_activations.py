"""Compressed activations as a training run uses them: the rank found or remembered, what was measured at first."""

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
    """Installed on a trainer's model. A rank found by measurement is kept in `work`, so a resumed run uses it too."""

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
    def unseen(self) -> bool:
        """Whether a first batch is to be looked at."""
        return self._choosing or self._reporting

    def look(self, loss: Loss) -> None:
        """Find the rank, and compare gradients, by the loss of the first batch."""
        if self._choosing:
            write_json(self._file, {"rank": choose_rank(self._compression, self._parameters, loss)})
        if self._reporting:
            self.measured = gradient_report(self._compression, self._parameters, loss)
        self._choosing = self._reporting = False

    @contextmanager
    def counted(self) -> Iterator[Figures]:
        """Inside `with`, what compression keeps is counted, and becomes the report where none was asked for."""
        with self._compression.measure(with_errors=False) as figures:
            yield figures
        if self.measured is None:
            self.measured = report(self._compression, figures, None)
