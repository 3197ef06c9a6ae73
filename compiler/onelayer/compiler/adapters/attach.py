"""Adapters in, an adapted empty model out; target modules by the user's names in, those that LoRA can adapt out."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapters.fit import check_fit
from onelayer.compiler.adapters.keys import KEY_PREFIX, LoraModule
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import Replacements, replacements_of
from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import unknown_name
from onelayer.compiler.libraries.parts import language_model
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit, bare_name


def linear_targets(model: nn.Module, target_modules: str | list[str]) -> str | list[str]:
    """Targets that adapt linear modules only: the given ones, or on a mixture the linears that "all-linear" means.

    Of a model that reads images or audio too, "all-linear" means its language model; towers are adapted by name.

    PEFT takes "all-linear" and the names of experts to mean, too, the stacked parameters that experts became in
    transformers 5. LoRA on those is no pair of factors per linear, so it could not be corrected for the original.
    Raises `InputError` if they are named, or if a name or pattern means no module.
    """
    if target_modules == "all-linear" and (prefix := language_model(model)) is not None:
        return _linears_below(model, prefix)
    probe = LoraConfig(target_modules=target_modules)
    convert_peft_config_for_transformers(probe, model, None)
    _check_names(model, target_modules, probe.target_modules or ())
    if not probe.target_parameters:
        return target_modules
    if target_modules == "all-linear":
        return sorted(probe.target_modules or [])
    raise InputError(
        f"target_modules: {', '.join(sorted(probe.target_parameters))} are experts or routers of a mixture, whose LoRA "
        "cannot be corrected for the original; name linear modules only, such as those of the attention, or all-linear"
    )


def _linears_below(model: nn.Module, prefix: str) -> list[str]:
    """List the linears of a part of a model, without what PEFT leaves out of "all-linear" on a mixture."""
    probe = LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(probe, model, None)
    kept = {name.rpartition(".")[2] for name in probe.target_modules or ()} if probe.target_parameters else None
    found = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D)
    ]
    return short_targets(model, [name for name in found if kept is None or name.rpartition(".")[2] in kept])


def _check_names(model: nn.Module, targets: str | list[str], kept: Collection[str]) -> None:
    """Raise `InputError` if a target means no module: PEFT drops a wrong name without a word if another one is right.

    `kept` are the targets that PEFT has not taken for experts.
    """
    modules = dict(model.named_modules())
    if isinstance(targets, str):
        try:
            found = targets == "all-linear" or any(re.fullmatch(targets, name) for name in modules)
        except re.error as error:
            raise InputError(f"target_modules: {targets!r} is no regular expression ({error}); correct it") from None
        if not found:
            raise InputError(f"target_modules: {targets!r} matches the name of no module; correct the pattern")
        return
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, kinds)})
    for target in targets:
        known = any(name == target or name.endswith(f".{target}") for name in modules)
        if not known and target in kept:
            raise InputError(f"target_modules: {target}: {unknown_name(target, leaves, 'module')}; correct the name")


def short_targets(model: nn.Module, modules: Collection[str]) -> list[str]:
    """Return names by which PEFT finds exactly `modules` in a model, adapted or not: their last parts where these do.

    vLLM and llama.cpp know modules by the last part, and the list stays short. A module whose last part means others
    too keeps its full name, and all do where PEFT would take a last part for the stacked experts of a mixture.
    """
    present = {bare_name(name) for name, _ in model.named_modules()}
    others = {name.rpartition(".")[2] for name in present.difference(modules)}
    leaves = {name: name.rpartition(".")[2] for name in modules}
    short = sorted({name if leaf in others else leaf for name, leaf in leaves.items()})
    probe = LoraConfig(target_modules=short)
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # some of the parts that experts were stacked from, without the others
        return sorted(modules)
    unchanged = not probe.target_parameters and set(probe.target_modules or ()) == set(short)
    return short if unchanged else sorted(modules)


@dataclass(frozen=True)
class Adapted:
    """The streamed original with adapters by name: their factors are attached, `replacements` wait for their units."""

    streamed: StreamedModel
    replacements: Mapping[str, Replacements]


def adapted_model(directory: Path, adapters: Mapping[str, Adapter]) -> Adapted:
    """Open a model with adapters attached. Raises `InputError` naming the first key that has no place in it.

    PEFT makes the layers of the factors, by the modules that the files name; the factors and their scaling are set from
    the files. PEFT's own loading is not used: for some architectures it renames keys that it wrote itself, warns that
    they are missing, and goes on with random factors.
    """
    if not adapters:
        return Adapted(StreamedModel(directory), {})
    bare = StreamedModel(directory)
    for adapter in adapters.values():
        check_fit(adapter, bare)
    replacements = {name: replacements_of(adapter, bare) for name, adapter in adapters.items()}

    def prepare(model: PreTrainedModel) -> None:
        for name, adapter in adapters.items():
            _attach(model, adapter, name)
        model.eval()

    replaced = {parameter for each in replacements.values() for parameter in each}
    return Adapted(StreamedModel(directory, prepare, replaced), replacements)


def _attach(model: PreTrainedModel, source: Adapter, adapter: str) -> None:
    if not source.modules:
        return
    config = LoraConfig(target_modules=list(source.modules), fan_in_fan_out=source.config.fan_in_fan_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on ties, Conv1D and targets; the given keys decide alone
        keys = {module.key_a.removeprefix(KEY_PREFIX): torch.empty(0) for module in source.modules.values()}
        inject_adapter_in_model(config, model, adapter, low_cpu_mem_usage=True, state_dict=keys)
    for name, module in source.modules.items():
        layer: Any = model.get_submodule(name)
        a, b = (source.read(key).float() for key in (module.key_a, module.key_b))
        _set_factors(layer, module, adapter, a, b)


def _set_factors(layer: Any, module: LoraModule, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Set factors in a layer that PEFT made with others; float32, as PEFT holds trained factors."""
    if module.embedding:
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = nn.Parameter(a), nn.Parameter(b)
    else:
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = nn.Parameter(a), nn.Parameter(b)
    layer.scaling[adapter] = module.scaling


def factor_names(module: str, embedding: bool, adapter: str) -> tuple[str, str]:
    """Return the parameters A and B of an adapted module, as PEFT names them in the model."""
    if embedding:
        return f"{module}.lora_embedding_A.{adapter}", f"{module}.lora_embedding_B.{adapter}"
    return f"{module}.lora_A.{adapter}.weight", f"{module}.lora_B.{adapter}.weight"


def tuner_layers(unit: Unit) -> list[Any]:
    """List the modules of a unit that PEFT has wrapped."""
    return [part for part in unit.module.modules() if isinstance(part, BaseTunerLayer)]
