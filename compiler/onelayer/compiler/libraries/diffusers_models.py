"""The place where the streaming side touches diffusers: a component's directory in, its class without weights out.

diffusers converts nothing as it loads: names in a checkpoint are runtime names, but for attention blocks of old UNets.
Used here, and nowhere else: `_no_split_modules`, `_keep_in_fp32_modules`, `_fix_state_dict_keys_on_load`,
`_set_default_torch_dtype`, `no_init_weights`, `_fetch_remapped_cls_from_config`.
`tests/compiler/libraries/test_diffusers_models.py` shows which one broke.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.construction import MODULES_WITHOUT_WEIGHTS, building, check_tables
from onelayer.compiler.libraries.modules import (
    FLOAT_DTYPES,
    LoadPlan,
    missing_parameters,
    modules_in_lists,
    owner_of,
    refuse_missing,
    refuse_quantized,
)
from onelayer.compiler.storage.checkpoint import Checkpoint, floating_bytes
from onelayer.compiler.storage.model_config import CONFIG_FILE, read_model_config

try:
    import diffusers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from diffusers import ModelMixin
    from diffusers.models.model_loading_utils import _CLASS_REMAPPING_DICT, _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import no_init_weights
except ImportError as error:
    raise InputError(f'a model of diffusers needs diffusers ({error}); pip install "onelayer[diffusion]"') from None

DENOISES: bool = True
Config = dict[str, Any]
# Classes of diffusers, which are typed in part only.
Model = Any
ModelClass = Any


def read_config(directory: Path) -> Config:
    """Read the config of an original. Refuse an emulator and packed weights by name."""
    config = load_config(directory)
    if (found := config.get("quantization_config")) is not None:
        if found.get("quant_method") == "onelayer":
            raise InputError(f"{directory}: is an emulator; give the original model that it was compiled from")
        method = found.get("quant_method", "quantized")
        path = directory / CONFIG_FILE
        raise InputError(f"{path}: field quantization_config: {method!r} weights; give the unquantized original")
    return config


def load_config(directory: Path) -> Config:
    """Read the config of a component. The document keeps its directory, for messages."""
    return {**read_model_config(directory), "_name_or_path": str(directory)}


def model_class(config: Mapping[str, Any], directory: Path) -> ModelClass:
    """Return the stock class that `_class_name` names; remote code is never run."""
    name = config["_class_name"]
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise InputError(
            f"{directory / CONFIG_FILE}: field _class_name: {name!r} is not a model of diffusers "
            f"{diffusers.__version__}; custom code is not run, give a model of a stock class"
        )
    return _fetch_remapped_cls_from_config(config, cls) if name in _CLASS_REMAPPING_DICT else cls


def compute_dtype(config: Mapping[str, Any], checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of most of the stored bytes: diffusers' configs name none."""
    stored = floating_bytes(checkpoint)
    return FLOAT_DTYPES[max(stored, key=lambda dtype: stored[dtype])] if stored else torch.float32


def empty_model(
    config: Mapping[str, Any], cls: ModelClass, dtype: torch.dtype, limit: int = MODULES_WITHOUT_WEIGHTS
) -> Model:
    """Build the real model without values of parameters; buffers are real, on the host."""
    config_file = Path(config["_name_or_path"]) / CONFIG_FILE
    with building(config_file, limit):
        before = cls._set_default_torch_dtype(dtype)
        try:
            with torch.random.fork_rng(devices=[]), no_init_weights(), init_empty_weights(include_buffers=False):
                model = cls.from_config({key: value for key, value in config.items() if key[0] != "_"})
        finally:
            torch.set_default_dtype(before)
    check_tables(model, config_file)
    return model


def build_skeleton(
    config: Mapping[str, Any],
    cls: ModelClass,
    dtype: torch.dtype,
    computed: Collection[str] = (),
    limit: int = MODULES_WITHOUT_WEIGHTS,
) -> Model:
    """Build the real model on the meta device, in evaluation mode; buffers are real. No parameter is `computed`."""
    model = empty_model(config, cls, dtype, limit)
    for name, parameter in list(model.named_parameters()):
        kept = _dtype_of(model, name, dtype) if parameter.is_floating_point() else parameter.dtype
        owner, leaf = owner_of(model, name)
        empty = torch.empty_like(parameter, device="meta", dtype=kept)
        owner._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    model.eval()
    return model


def _dtype_of(model: Model, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter: float32 for those that diffusers keeps there."""
    kept = model._keep_in_fp32_modules or ()
    kept = [kept] if isinstance(kept, str) else kept
    return torch.float32 if dtype != torch.float64 and any(part in kept for part in name.split(".")) else dtype


def block_modules(model: torch.nn.Module) -> frozenset[torch.nn.Module]:
    """Find the repeated layers: what diffusers declares indivisible, the innermost if one block holds others."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, ModelMixin)]
    names = {name for part in parts for name in part._no_split_modules or ()}
    declared = {module for module in model.modules() if type(module).__name__ in names}
    inner = frozenset(
        module for module in declared if all(part is module or part not in declared for part in module.modules())
    )
    return inner or modules_in_lists(model)


def plan_loading(model: Model, checkpoint: Checkpoint) -> LoadPlan:
    """Map every parameter and persistent buffer to its tensor."""
    expected = model.state_dict()
    keys: dict[str, tuple[str, ...]] = {}
    for name, key in _renamed(model, checkpoint.tensors).items():
        if name in expected:
            refuse_quantized(key, checkpoint.tensors[key].dtype, expected[name])
            keys[name] = (key,)
    return LoadPlan(keys, frozenset(keys), {})


def _renamed(model: Model, keys: Collection[str]) -> dict[str, str]:
    """Map runtime names to checkpoint keys."""
    table = {key: key for key in keys}
    model._fix_state_dict_keys_on_load(table)  # in place
    return table


def computed_parameters(model: Model, plan: LoadPlan, directory: Path) -> frozenset[str]:
    """Return nothing: diffusers has no parameter that a checkpoint may lack. Raises `InputError` naming the first."""
    refuse_missing(model, missing_parameters(model, plan), directory)
    return frozenset()


def tied_names(model: torch.nn.Module) -> frozenset[str]:
    """Return nothing: diffusers ties no weights."""
    return frozenset()


def tied_with(model: torch.nn.Module, name: str) -> frozenset[str]:
    """Return nothing: diffusers ties no weights."""
    return frozenset()


class _Renaming:
    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the given parameters, in the dtype that each is computed in. Raises `InputError` for a wrong shape."""
        for name, key in _renamed(self.model, tensors).items():
            owner, leaf = owner_of(self.model, name)
            slots: Any = owner._buffers if leaf in owner._buffers else owner._parameters
            tensor, wanted = tensors[key], slots[leaf]
            if wanted is None or wanted.shape != tensor.shape:
                fits = None if wanted is None else tuple(wanted.shape)
                raise InputError(f"tensor {key}: shape {tuple(tensor.shape)} does not fit the config's {fits}")
            if tensor.is_floating_point():
                tensor = tensor.to(_dtype_of(self.model, name, self.dtype))
            slots[leaf] = tensor if slots is owner._buffers else torch.nn.Parameter(tensor, requires_grad=False)


def converter(model: Model, dtype: torch.dtype) -> _Renaming:
    """Return what sets tensors as parameters of an empty model."""
    return _Renaming(model, dtype)
