"""Checkpoint tensors in, parameters out, by transformers' own loading, for a part of a model at a time.

Used here, and nowhere else: `get_model_conversion_mapping`, `convert_and_load_state_dict_in_model`,
`LoadStateDictConfig`, `_get_dtype_plan`.
`tests/compiler/libraries/test_transformers_models.py` shows which one broke.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from onelayer.compiler.errors import InputError


def conversion_rules(model: PreTrainedModel) -> list[WeightConverter | WeightRenaming]:
    """Return transformers' rules from checkpoint tensors to the parameters of a model."""
    return cast("list[WeightConverter | WeightRenaming]", get_model_conversion_mapping(model))


class Conversion:
    """What turns the tensors of a checkpoint into parameters of `model`, which is empty between two conversions."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._rules = conversion_rules(model)
        self._dtype_plan = model._get_dtype_plan(dtype)
        self._parameters = model.state_dict()
        self._buffers = list(model.named_buffers())

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters of the model that the given checkpoint tensors make, converted, on the host.

        Raises `InputError` naming the first tensor whose shape or conversion does not fit.
        """
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self._dtype_plan,
            device_map={"": "cpu"},
            weight_mapping=copy.deepcopy(self._rules),  # rules collect state, so each call needs fresh ones
        )
        with _quiet(), self._listed_once():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), settings)
        for name, stored, wanted in info.mismatched_keys:
            raise InputError(f"tensor {name}: shape {tuple(stored)} does not fit the config's {tuple(wanted)}")
        for name, reason in info.conversion_errors.items():
            raise InputError(f"tensor {name}: cannot be converted ({reason.strip().splitlines()[-1]})")

    @contextmanager
    def _listed_once(self) -> Iterator[None]:
        """Answer with the lists of the empty model while a unit is converted.

        transformers lists all parameters and buffers at each call. The time of a pass would grow with the square of
        the number of layers.
        """
        # An instance attribute hides the class's method and is gone when removed.
        own = {"state_dict": lambda: self._parameters, "named_buffers": lambda: iter(self._buffers)}
        self.model.__dict__.update(own)
        try:
            yield
        finally:
            for name in own:
                del self.model.__dict__[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own bar, which would count tensors inside our units."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
