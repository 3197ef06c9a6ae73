"""The plugin that lets plain `AutoModel.from_pretrained(emulator)` work: importing this module registers it.

In: the `quantization_config` of an emulator's config.json. Out: the stock model class with every listed linear replaced
by a `LowRankLinear`, before the weights are read. `quant_method` is the one door that transformers opens to foreign
modules on loading; nothing here is quantised.

Touched of transformers' semi-private surface, all of it in this file: the hooks `update_attn_implementation`,
`_process_model_before_weight_loading`, `_process_model_after_weight_loading` and `get_state_dict_and_metadata` of
`HfQuantizer`, and the config attribute `transformers_weights`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from onelayer.compiler.errors import InputError
from onelayer.runtime.model import LowRankLinear

if TYPE_CHECKING:
    # Not at run time: the import hook of this package runs while transformers.modeling_utils is still half imported.
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "onelayer"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class EmulatorConfig(QuantizationConfigMixin):
    """The `quantization_config` of an emulator: ranks by runtime module name, provenance, and the weights file.

    Fields it does not know are kept, so that a folder saved again loses nothing.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        format_version: int,
        weights_file: str | None = None,
        quant_method: str = METHOD,
        **provenance: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"config.json: quantization_config.format_version is {format_version!r}, this onelayer reads "
                f"{FORMAT_VERSION}; compile the emulator again, or install the onelayer that wrote it"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an enumeration of transformers' own methods
        self.format_version = format_version
        self.ranks = ranks
        self.weights_file = weights_file
        vars(self).update(provenance)

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain; a folder that transformers saved again has standard file names and no `weights_file`."""
        fields: dict[str, Any] = super().to_dict()
        if fields["weights_file"] is None:
            del fields["weights_file"]
        return fields


@register_quantizer(METHOD)
class EmulatorQuantizer(HfQuantizer):
    """Swaps linears for factors on the empty model; transformers then loads the factors like any parameter."""

    requires_calibration = True  # transformers' word for: only from a checkpoint already in this form
    quantization_config: EmulatorConfig

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Point to the weights file; the one hook that sees the config before files are looked up.

        The file's name is not the standard one on purpose: without this plugin, transformers would merely warn of an
        unknown method and return random weights. So it finds no file, and stops.
        """
        if self.quantization_config.weights_file is not None:
            config.transformers_weights = self.quantization_config.weights_file
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        replaced = replace_linears(model, self.quantization_config.ranks)
        _check_factors(checkpoint_files or [], replaced)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.lr_up.requires_grad_(False)
                module.lr_down.requires_grad_(False)
        # Saved again, the weights get the standard name, so a pointer to the old one must not be saved with them.
        self.quantization_config.weights_file = None
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the factors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters on it; Trainer goes on refusing the bare emulator."""
        return True


def replace_linears(model: "PreTrainedModel", ranks: dict[str, int]) -> int:
    """Put a `LowRankLinear` in the place of every named linear of an empty model; returns how many there were.

    A folder can be loaded as another class than it was written from, with or without the head: names are looked up with
    and without the base model's prefix, and a head's linear that this class does not have is passed over.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    replaced = 0
    for name, rank in ranks.items():
        found = next((known for known in (name, name.removeprefix(prefix), prefix + name) if known in modules), None)
        if found is not None:
            path, _, leaf = found.rpartition(".")
            setattr(modules[path], leaf, _low_rank(found, modules[found], rank))
            replaced += 1
        elif name.startswith(prefix):
            raise InputError(f"config.json: quantization_config.ranks names {name}, which {type(model).__name__} lacks")
    return replaced


def _low_rank(name: str, module: nn.Module, rank: int) -> LowRankLinear:
    """Empty factors with the shape, dtype and device of a linear or of GPT-2's `Conv1D`, whose weight is (in, out)."""
    if not isinstance(module, nn.Linear | Conv1D):
        raise InputError(f"config.json: quantization_config.ranks names {name}, which is a {type(module).__name__}")
    weight: torch.Tensor = module.weight
    features = tuple(weight.shape) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])
    low_rank = LowRankLinear(
        in_features=features[0],
        out_features=features[1],
        rank=rank,
        bias=module.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        was_conv1d=isinstance(module, Conv1D),
    )
    # Keeps transformers' initialiser away, which would write to `weight`.
    low_rank._is_hf_initialized = True  # type: ignore[assignment]
    return low_rank


def _check_factors(checkpoint_files: list[str], replaced: int) -> None:
    """Refuse files outside the folder, and fewer factors than modules, which transformers would leave uninitialised."""
    folders = {Path(file).parent for file in checkpoint_files}
    if len(folders) > 1:
        raise InputError(f"{sorted(folders)[0]}: the index names files outside the folder; compile the emulator again")
    names = [name for file in checkpoint_files for name in _tensor_names(file)]
    for factor in (".lr_up", ".lr_down"):
        stored = sum(name.endswith(factor) for name in names)
        if checkpoint_files and stored < replaced:
            raise InputError(
                f"{Path(checkpoint_files[0]).parent}: {replaced} modules need a tensor named *{factor} and the files "
                f"hold {stored}; copy the emulator again"
            )


def _tensor_names(file: str) -> list[str]:
    with safe_open(file, framework="pt") as header:
        return list(header.keys())
