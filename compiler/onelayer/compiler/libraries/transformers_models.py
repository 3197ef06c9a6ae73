"""The place where the streaming side touches transformers' semi-private surface.

In: a model directory. Out: the real model class without weights, and its own rules for turning checkpoint tensors into
parameters. Used here, and nowhere else: `rename_source_key`, `initialize_weights`,
`_no_split_modules`, `_keys_to_ignore_on_load_missing`, `all_tied_weights_keys`, `named_non_persistent_buffers`;
`conversion.py` has what it takes to convert tensors.
`tests/compiler/libraries/test_transformers_models.py` shows which one broke.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from onelayer.compiler.dequantize.formats import FIELD, check_library, format_of, quantization_settings
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.construction import MODULES_WITHOUT_WEIGHTS, building, check_tables
from onelayer.compiler.libraries.conversion import Conversion, conversion_rules
from onelayer.compiler.libraries.modules import (
    FLOAT_DTYPES,
    LoadPlan,
    missing_parameters,
    modules_in_lists,
    owner_of,
    refuse_missing,
    refuse_quantized,
)
from onelayer.compiler.libraries.parts import projectors
from onelayer.compiler.storage.checkpoint import Checkpoint, floating_bytes
from onelayer.compiler.storage.model_config import CONFIG_FILE, read_model_config

DENOISES: bool = False
GENERATION_FILE = "generation_config.json"


def read_config(directory: Path) -> PreTrainedConfig:
    """Read the model's config and switch caches off. Refuse by name what cannot be streamed."""
    settings = quantization_settings(read_model_config(directory))
    if settings is not None:
        check_library(format_of(settings, directory / CONFIG_FILE), directory / CONFIG_FILE)
    config = load_config(directory)
    for part in _sub_configs(config):
        if getattr(part, FIELD, None) is not None:
            delattr(part, FIELD)  # the weights are unpacked as they are read, so the model is a plain one
        if getattr(part, "use_cache", None):
            part.use_cache = False  # a key-value cache would grow with depth and serves no streamed pass
    return config


def load_config(directory: Path) -> PreTrainedConfig:
    """Read the model's config as transformers does. Raises `InputError` naming the file and what is wrong with it."""
    known = read_model_config(directory).get("model_type")
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # its checks, and whatever its classes do with values that they do not check
        reason = f"model_type {known!r} is unknown to transformers {transformers.__version__}"
        remedy = "upgrade transformers or give another model"
        if isinstance(known, str) and known in transformers.CONFIG_MAPPING:
            reason, remedy = f"{type(error).__name__}: {error}", "restore the file"
        raise InputError(f"{directory / CONFIG_FILE}: {reason}; {remedy}") from None
    if (directory / GENERATION_FILE).is_file():  # nothing streamed needs it, but what is made would not load with it
        try:
            transformers.GenerationConfig.from_pretrained(directory)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{directory / GENERATION_FILE}: {reason}; restore or remove the file") from None
    return config


def _sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _sub_configs(part)


def model_class(config: PreTrainedConfig, directory: Path) -> type[PreTrainedModel]:
    """Return the stock class that `config.architectures` names; remote code is never run."""
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        given = ", ".join(map(str, names)) or "nothing"
        raise InputError(
            f"{directory / CONFIG_FILE}: field architectures: {given} is not one class of transformers "
            f"{transformers.__version__}; custom code is not run, give a model of a stock architecture"
        )
    return cls


def compute_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Return the config's dtype, else the floating dtype of most of the stored bytes.

    A single tensor says nothing: models in bfloat16 often store norms or routers in float32.
    """
    if isinstance(config.dtype, torch.dtype) and config.dtype in FLOAT_DTYPES.values():
        return config.dtype
    stored = floating_bytes(checkpoint)
    return FLOAT_DTYPES[max(stored, key=lambda dtype: stored[dtype])] if stored else torch.float32


def _config_file(config: PreTrainedConfig) -> Path:
    return Path(config.name_or_path or "") / CONFIG_FILE


def empty_model(
    config: PreTrainedConfig, cls: type[PreTrainedModel], dtype: torch.dtype, limit: int = MODULES_WITHOUT_WEIGHTS
) -> PreTrainedModel:
    """Build the real model on the meta device, without values. Raises `InputError` if its config makes none."""
    config_file = _config_file(config)
    with building(config_file, limit), torch.device("meta"):
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    check_tables(model, config_file)
    return model


def build_skeleton(
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    dtype: torch.dtype,
    computed: Collection[str] = (),
    limit: int = MODULES_WITHOUT_WEIGHTS,
) -> PreTrainedModel:
    """Build the real model on the meta device, in evaluation mode, of at most `limit` modules.

    Buffers that no checkpoint holds are real, on the host, and so are the parameters named in `computed`.
    """
    model = empty_model(config, cls, dtype, limit)
    with building(_config_file(config), limit):
        _fill_in(model, computed)
    return model


def _fill_in(model: PreTrainedModel, computed: Collection[str]) -> None:
    """Make the buffers of an empty model real, and the parameters named in `computed`; switch it to evaluation."""
    for name, parameter in list(model.named_parameters()):
        if name in computed:
            owner, leaf = owner_of(model, name)
            owner._parameters[leaf] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            continue
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps the initializer from touching it
        parameter.requires_grad_(False)
    for name, buffer in list(model.named_buffers()):
        owner, leaf = owner_of(model, name)
        owner._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.initialize_weights()
    model.eval()


def holds_layers(module: torch.nn.Module) -> bool:
    """Whether a module contains a list of layers, as a stage of Swin or an encoder: those are the layers then."""
    lists = (part for part in module.modules() if isinstance(part, torch.nn.ModuleList))
    return any(isinstance(item, GradientCheckpointingLayer) for part in lists for item in part)


def layer_modules(model: PreTrainedModel) -> frozenset[torch.nn.Module]:
    """Find the layers, which are what transformers itself declares indivisible and holds no further layers.

    In a model without such a declaration, they are the modules in its outermost `ModuleList`s.
    """
    names = model._no_split_modules or ()
    declared = frozenset(
        module
        for module in model.modules()
        if (type(module).__name__ in names or isinstance(module, GradientCheckpointingLayer))
        and not holds_layers(module)
    )
    return declared or modules_in_lists(model)


def block_modules(model: PreTrainedModel) -> frozenset[torch.nn.Module]:
    """Find the layers. The projectors between towers and a language model count as layers."""
    layers = layer_modules(model)
    return layers | projectors(model, layers)


def plan_loading(model: PreTrainedModel, checkpoint: Checkpoint) -> LoadPlan:
    """Map every parameter and persistent buffer to its checkpoint keys, by transformers' own rules."""
    expected = model.state_dict()
    rules = conversion_rules(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    keys: dict[str, list[str]] = {}
    converted: set[str] = set()
    for key in checkpoint.tensors:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        names = [name]
        if pattern is not None:
            targets = by_pattern[pattern].target_patterns
            names = [name.replace(targets[0], target) for target in targets]
            converted.update(names)
        for target in names:
            if target in expected:
                refuse_quantized(key, checkpoint.tensors[key].dtype, expected[target])
                keys.setdefault(target, []).append(key)
    stored = {name: tuple(sources) for name, sources in keys.items()}
    stored_unchanged = frozenset(
        name for name, sources in stored.items() if len(sources) == 1 and name not in converted
    )
    return LoadPlan(stored, stored_unchanged, _aliases(model, set(stored)))


def _aliases(model: PreTrainedModel, stored: set[str]) -> dict[str, str]:
    """Map every tied parameter that the checkpoint lacks to the member of its tie that the checkpoint has."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    alias = {}
    for members in groups.values():
        present = sorted(members & stored)
        if present:
            alias.update(dict.fromkeys(members - stored, present[0]))
    return alias


def tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the runtime names that share their values with another name."""
    return frozenset(model.all_tied_weights_keys) | frozenset(model.all_tied_weights_keys.values())


def tied_with(model: PreTrainedModel, name: str) -> frozenset[str]:
    """Return the other runtime names that the model ties to a name; they are all one parameter."""
    ties = model.all_tied_weights_keys
    source = ties.get(name, name)
    return frozenset({source, *(target for target, tied in ties.items() if tied == source)}) - {name}


def computed_parameters(model: PreTrainedModel, plan: LoadPlan, directory: Path) -> frozenset[str]:
    """Find missing parameters that the model computes itself: its class says that no checkpoint has to hold them.

    Raises `InputError` naming the first of all other missing parameters.
    """
    patterns = model._keys_to_ignore_on_load_missing or ()
    missing = missing_parameters(model, plan)
    computed = frozenset(name for name in missing if any(re.search(pattern, name) for pattern in patterns))
    refuse_missing(model, [name for name in missing if name not in computed], directory)
    return computed


def converter(model: PreTrainedModel, dtype: torch.dtype) -> Conversion:
    """Return what converts the tensors of a checkpoint for an empty model."""
    return Conversion(model, dtype)
