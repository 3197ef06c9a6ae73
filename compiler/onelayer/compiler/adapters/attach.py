"""Target modules by the user's names in, those that plain LoRA can adapt out."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.units import Unit


def linear_targets(model: nn.Module, target_modules: str | list[str]) -> str | list[str]:
    """Targets that adapt linear modules only: the given ones, or on a mixture the linears that "all-linear" means.

    PEFT takes "all-linear" and the names of experts to mean, too, the stacked parameters that experts became in
    transformers 5. LoRA on those is no pair of factors per linear, so it could not be corrected for the original.
    Raises `InputError` if they are named.
    """
    probe = LoraConfig(target_modules=target_modules)
    convert_peft_config_for_transformers(probe, model, None)
    if not probe.target_parameters:
        return target_modules
    if target_modules == "all-linear":
        return sorted(probe.target_modules or [])
    raise InputError(
        f"target_modules: {sorted(probe.target_parameters)} are experts or routers of a mixture, whose LoRA cannot be "
        "corrected for the original; name linear modules only, such as those of the attention, or all-linear"
    )


def attach(adapters: Mapping[str, str | Path]) -> Callable[[PreTrainedModel], None]:
    """Lets PEFT wrap the empty model in every adapter, by name; their own small weights are real, on the host.

    The factors are then read from the files again: for some architectures PEFT renames keys that it wrote itself, warns
    that they are missing, and goes on with random ones.
    """

    def prepare(model: PreTrainedModel) -> None:
        wrapped: Any = None
        with warnings.catch_warnings():
            # Both are PEFT's own: the keys it renamed, and a name of transformers that it should not use any more.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            for name, path in adapters.items():
                if wrapped is None:
                    # A task would give every adapter a head of its own, those too that have none in their files.
                    config = LoraConfig.from_pretrained(str(path))
                    config.task_type = None
                    wrapped = PeftModel.from_pretrained(model, path, name, config=config, low_cpu_mem_usage=True)
                else:
                    wrapped.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
        for name, path in adapters.items():
            _fill(model, Adapter.open(path), name)
        model.eval()

    return prepare


def factor_names(module: str, embedding: bool, adapter: str) -> tuple[str, str]:
    """Return the parameters A and B of an adapted module, as PEFT names them in the model."""
    if embedding:
        return f"{module}.lora_embedding_A.{adapter}", f"{module}.lora_embedding_B.{adapter}"
    return f"{module}.lora_A.{adapter}.weight", f"{module}.lora_B.{adapter}.weight"


def _fill(model: PreTrainedModel, source: Adapter, adapter: str) -> None:
    for name, module in source.modules.items():
        names = factor_names(name, module.embedding, adapter)
        for parameter, key in zip(names, (module.key_a, module.key_b), strict=True):
            found = model.get_parameter(parameter)
            tensor = source.read(key)
            found.data = tensor.to(torch.float32 if found.is_meta else found.dtype)


def tuner_layers(unit: Unit) -> list[Any]:
    """List the modules of a unit that PEFT has wrapped."""
    return [part for part in unit.module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
