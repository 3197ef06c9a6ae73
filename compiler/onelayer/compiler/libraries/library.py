"""The interface of a library of models: a model directory in, its real class without weights and its loading out.

Every pass asks this interface and no library by name. `transformers_models` and `diffusers_models` implement it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from onelayer.compiler.libraries import transformers_models
from onelayer.compiler.libraries.construction import MODULES_WITHOUT_WEIGHTS
from onelayer.compiler.libraries.modules import LoadPlan
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.model_config import is_diffusers_config, read_model_config


class Converter(Protocol):
    """What turns the tensors of a checkpoint into parameters of one empty model."""

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters that the given tensors make, on the host. Raises `InputError` naming what does not fit."""


class Library(Protocol):
    """What each library answers. A config is of the library's own kind; only the library looks inside.

    `DENOISES` tells models that are called with encoded images and noise from those that are called with tokens.
    """

    DENOISES: bool

    def read_config(self, directory: Path) -> Any:
        """Read the config of a model that can be streamed. Raises `InputError` for any other."""

    def load_config(self, directory: Path) -> Any:
        """Read the config of a model or an emulator."""

    def model_class(self, config: Any, directory: Path) -> Any:
        """Return the stock class that the config names."""

    def compute_dtype(self, config: Any, checkpoint: Checkpoint) -> torch.dtype:
        """Return the dtype in which the model computes."""

    def empty_model(self, config: Any, cls: Any, dtype: torch.dtype, limit: int = MODULES_WITHOUT_WEIGHTS) -> Any:
        """Build the model on the meta device, without values."""

    def build_skeleton(
        self,
        config: Any,
        cls: Any,
        dtype: torch.dtype,
        computed: Collection[str] = (),
        limit: int = MODULES_WITHOUT_WEIGHTS,
    ) -> Any:
        """Build the model on the meta device with real buffers, in evaluation mode."""

    def block_modules(self, model: Any) -> frozenset[torch.nn.Module]:
        """Find the repeated layers."""

    def plan_loading(self, model: Any, checkpoint: Checkpoint) -> LoadPlan:
        """Map every parameter and persistent buffer to its checkpoint keys."""

    def computed_parameters(self, model: Any, plan: LoadPlan, directory: Path) -> frozenset[str]:
        """Find missing parameters that the model computes itself. Raises `InputError` naming any other."""

    def tied_names(self, model: Any) -> frozenset[str]:
        """Return the runtime names that share their values with another name."""

    def tied_with(self, model: Any, name: str) -> frozenset[str]:
        """Return the other runtime names that are one parameter with `name`."""

    def converter(self, model: Any, dtype: torch.dtype) -> Converter:
        """Return what converts the tensors of a checkpoint for an empty model."""


def library_of(directory: Path) -> Library:
    """Return the library that a model directory is written for. Raises `InputError` if its config.json is missing."""
    if not is_diffusers_config(read_model_config(directory)):
        return transformers_models
    from onelayer.compiler.libraries import diffusers_models

    return diffusers_models
