"""The plugin that lets `FluxTransformer2DModel.from_pretrained(emulator)` work: importing this module registers it.

diffusers has no function to register a loader: its registry is two dictionaries, and it reads `quant_method.value`. A
directory whose method is not registered is refused there with a ValueError, so no emulator loads as random weights.

Used of diffusers' semi-private surface, only in this file: `AUTO_QUANTIZER_MAPPING`, `AUTO_QUANTIZATION_CONFIG_MAPPING`
and the hooks of `DiffusersQuantizer`.
"""

from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from onelayer.compiler.errors import InputError
from onelayer.runtime.modules.low_rank_linear import CompressedLinear
from onelayer.runtime.modules.transformers_plugin import METHOD, EmulatorConfig, replace_linears


class Method(StrEnum):
    """The method's name as diffusers reads it, with a `value`."""

    ONELAYER = METHOD


class DiffusersEmulatorConfig(EmulatorConfig):
    """The `quantization_config` of an emulator of a diffusers model: the same fields as in a transformers directory."""

    stored_dtype: str

    def __init__(self, ranks: dict[str, int], format_version: int, quant_method: str = METHOD, **fields: Any) -> None:
        super().__init__(ranks, format_version, **fields)
        self.quant_method = Method.ONELAYER  # type: ignore[assignment]  # theirs are an enumeration

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**super().to_dict(), "quant_method": METHOD}


class DiffusersEmulatorQuantizer(DiffusersQuantizer):
    """Swaps linears for factors on the empty model; diffusers then loads the factors like any parameter."""

    requires_calibration = True  # diffusers' name for: loads only a checkpoint that has this form already
    use_keep_in_fp32_modules = True  # as for the original
    quantization_config: Any  # a `DiffusersEmulatorConfig`

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Choose the original's dtype unless another is asked for; diffusers would take float32."""
        stored: torch.dtype = getattr(torch, self.quantization_config.stored_dtype)
        return torch_dtype or stored

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        settings = self.quantization_config
        replaced = replace_linears(model, settings.modules, settings.quantization, settings.code_shapes)
        if len(replaced) != len(settings.modules):
            raise InputError(f"config.json: quantization_config.ranks names modules that {type(model).__name__} lacks")

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a factor that is in no file: diffusers would only warn of it."""
        if lacking := [key for key in missing_keys if key.rpartition(".")[2].startswith("lr_")]:
            raise InputError(f"{len(lacking)} factors are in no file, {min(lacking)!r} first; copy the emulator again")
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.freeze()
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: it writes the factors unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the emulator can be trained."""
        return True


AUTO_QUANTIZER_MAPPING[METHOD] = DiffusersEmulatorQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DiffusersEmulatorConfig
