"""An adapter and the empty model it is said to be for: does every key have its place there, with the right shape?"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapters.keys import LoraModule
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.streamed_model import StreamedModel


def check_fit(adapter: Adapter, streamed: StreamedModel) -> dict[str, nn.Module]:
    """List the adapted modules of the empty model. Raises `InputError` naming the first key without a place."""
    modules = {name: _adapted_module(adapter, streamed, module) for name, module in adapter.modules.items()}
    for parameter, key in adapter.dense.items():
        _check_shape(adapter, streamed, key, parameter, adapter.tensors[key].shape)
    for name, (key, rows) in adapter.token_rows.items():
        shape = _shape_of(adapter, streamed, key, f"{name}.weight")
        if len(shape) != 2 or adapter.tensors[key].shape[1] != shape[1] or not all(0 <= row < shape[0] for row in rows):
            raise InputError(
                f"{adapter.directory}: {key}: does not fit {name} {shape} of {streamed.checkpoint.directory}; "
                "give the model it was trained on"
            )
    return modules


def check_made_for(adapter: Adapter, model: Path, digest: str) -> None:
    """Refuse an adapter whose record names another original than `model`, which has this digest."""
    made_for = adapter.recorded_digest("base")
    if made_for is not None and made_for != digest:
        raise InputError(
            f"{adapter.directory}: was made for another original ({made_for[:12]}) than {model} ({digest[:12]}); "
            "give the model it was made for"
        )


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight (in, out), so that the adapted weight is W + s (B A)^T."""
    return isinstance(module, (Conv1D, nn.Embedding))


def _adapted_module(adapter: Adapter, streamed: StreamedModel, lora: LoraModule) -> nn.Module:
    weight = f"{lora.name}.weight"
    shape: tuple[int, ...] = (lora.out_features, lora.in_features)
    _shape_of(adapter, streamed, lora.key_a, weight)
    module = streamed.model.get_submodule(lora.name)
    if not isinstance(module, nn.Embedding if lora.embedding else (nn.Linear, Conv1D)):
        raise InputError(
            f"{adapter.directory}: {lora.name} is a {type(module).__name__} in {streamed.checkpoint.directory}, which "
            "cannot be adapted; give the model it was trained on"
        )
    _check_shape(adapter, streamed, lora.key_a, weight, shape[::-1] if is_transposed(module) else shape)
    return module


def _check_shape(adapter: Adapter, streamed: StreamedModel, key: str, parameter: str, shape: Sequence[int]) -> None:
    found = _shape_of(adapter, streamed, key, parameter)
    if found != tuple(shape):
        raise InputError(
            f"{adapter.directory}: {key}: made for {parameter} {tuple(shape)}, but {streamed.checkpoint.directory} has "
            f"{found}; give the model it was trained on"
        )


def _shape_of(adapter: Adapter, streamed: StreamedModel, key: str, parameter: str) -> tuple[int, ...]:
    if parameter not in streamed.weights.checkpoint_keys:
        raise InputError(
            f"{adapter.directory}: key {key!r} has no place, {streamed.checkpoint.directory} has no {parameter}; "
            "give the model it was trained on"
        )
    return tuple(streamed.weights.bare_parameters[parameter].shape)
