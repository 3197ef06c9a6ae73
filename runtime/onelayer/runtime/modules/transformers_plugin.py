"""The plugin that lets plain `AutoModel.from_pretrained(emulator)` work: importing this module registers it.

In: the `quantization_config` of an emulator's config.json. Out: the stock model class with every listed linear replaced
by a `CompressedLinear` and every listed stack of experts by factors, before the weights are read. `quant_method` is the
only hook that transformers offers to foreign modules on loading. Nothing is quantized here.

Used of transformers' semi-private surface, only in this file: the hooks `update_attn_implementation`,
`_process_model_before_weight_loading`, `_process_model_after_weight_loading` and `get_state_dict_and_metadata` of
`HfQuantizer`, and the config attribute `transformers_weights`.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from onelayer.compiler.codes.forms import WINDOW_BITS, CodeBits, CodeShape
from onelayer.compiler.emulators.facts import StackFacts, WeightsFile
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.quantize import check_library
from onelayer.compiler.factors.stored_forms import known_factor_dtype
from onelayer.compiler.machine.half_products import quicken_half_products
from onelayer.runtime.modules.coded_linear import CodedLinear
from onelayer.runtime.modules.low_rank_experts import CompressedExperts, compress_experts, freeze_experts
from onelayer.runtime.modules.low_rank_linear import CompressedLinear, LowRankLinear
from onelayer.runtime.modules.quantized_linear import Quantization, QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


METHOD = "onelayer"
FORMAT_VERSIONS = (1, 2, 3, 4, 5)  # 2: with stacks of experts, 3 and 4: with codes of 8 bits, 5: of fewer


@register_quantization_config(METHOD)
class EmulatorConfig(QuantizationConfigMixin):
    """The `quantization_config` of an emulator: ranks by runtime module name, provenance, and the weights file.

    Unknown fields are kept, so that a folder that is saved again loses nothing.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        format_version: int,
        weights_file: str | None = None,
        factor_dtype: str | None = None,
        unpacked_dtype: str | None = None,
        quantized_dense: Sequence[str] = (),
        stacks: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **provenance: Any,
    ) -> None:
        if format_version not in FORMAT_VERSIONS:
            raise InputError(
                f"config.json: quantization_config.format_version is {format_version!r}, this onelayer reads "
                f"{FORMAT_VERSIONS[-1]}; compile the emulator again, or install the onelayer that wrote it"
            )
        if weights_file not in (None, *get_args(WeightsFile)):
            raise InputError(
                f"config.json: quantization_config.weights_file names {str(weights_file)[:80]!r}, which no emulator's "
                "weights are called; compile the emulator again"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an enumeration of transformers' own methods
        self.format_version = format_version
        self.ranks = ranks
        self.weights_file = weights_file
        self.factor_dtype, self.unpacked_dtype = factor_dtype, unpacked_dtype
        self.quantized_dense = list(quantized_dense)
        self.codes = dict(provenance.pop("codes", {}))
        self.code_bits: CodeBits = provenance.pop("code_bits", WINDOW_BITS)
        self.stacks = dict(stacks or {})
        vars(self).update(provenance)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. A folder that transformers saved again has no `weights_file`."""
        fields: dict[str, Any] = super().to_dict()
        optional = ["weights_file", "factor_dtype", "unpacked_dtype"]
        optional += ["quantized_dense"] if self.quantization is None else []
        optional += ["codes", "stacks"]
        optional += [] if self.codes else ["code_bits"]
        return {name: value for name, value in fields.items() if name not in optional or value}

    @property
    def quantization(self) -> Quantization | None:
        """How the factors are quantized; None if they are not."""
        factor_dtype = known_factor_dtype(self.factor_dtype)
        if factor_dtype is None:
            return None
        check_library(factor_dtype)
        return Quantization(factor_dtype, getattr(torch, str(self.unpacked_dtype)))

    @property
    def code_shapes(self) -> dict[str, CodeShape]:
        """The shape of the codes of every coded module."""
        return {name: CodeShape(width, self.code_bits) for name, width in self.codes.items()}

    @property
    def modules(self) -> dict[str, int | None]:
        """The rank of every compressed module; None for a weight that is quantized whole, or coded without factors."""
        return {**dict.fromkeys(self.codes), **self.ranks, **dict.fromkeys(self.quantized_dense)}


@register_quantizer(METHOD)
class EmulatorQuantizer(HfQuantizer):
    """Swaps linears for factors on the empty model; transformers then loads the factors like any parameter."""

    requires_calibration = True  # transformers' name for: loads only a checkpoint that has this form already
    quantization_config: EmulatorConfig

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Point to the weights file; no other hook sees the config before files are looked up.

        The file does not have the standard name on purpose: without this plugin, transformers would only warn of an
        unknown method and return random weights. With another name it finds no file and stops.
        """
        if self.quantization_config.weights_file is not None:
            config.transformers_weights = self.quantization_config.weights_file
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        settings = self.quantization_config
        quicken_half_products()  # a trainer that is not ours asks for no device of ours
        replaced = replace_linears(model, settings.modules, settings.quantization, settings.code_shapes)
        experts = replace_stacks(model, settings.stacks, settings.quantization)
        factors = [name for module in replaced for name in module.factors]
        _check_folder(model, checkpoint_files or [])
        _check_factors(checkpoint_files or [], [*factors, *(name for item in experts for name in item.tensors)])

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.freeze()
            freeze_experts(module)
        # Saving gives the weights the standard name, so a pointer to the old name must not be saved with them.
        self.quantization_config.weights_file = None
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: it writes the factors unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the emulator can be trained; Trainer still refuses the bare emulator."""
        return True


def replace_linears(
    model: "PreTrainedModel",
    ranks: Mapping[str, int | None],
    quantization: Quantization | None,
    codes: Mapping[str, CodeShape],
) -> list[CompressedLinear]:
    """Replace every named linear of an empty model by a `CompressedLinear`; return the new modules.

    Those in `codes` are coded, in the shape that it names.
    A folder can be loaded as a different class than it was written from, with or without the head. So names are looked
    up with and without the base model's prefix, and a head's linear that this class lacks is skipped.
    """
    modules = dict(model.named_modules())
    replaced = []
    for name, rank in ranks.items():
        path = _find_module(model, name, modules)
        if path is not None:
            parent, _, leaf = path.rpartition(".")
            replaced.append(_compressed(path, modules[path], rank, quantization, codes.get(name)))
            setattr(modules[parent], leaf, replaced[-1])
    return replaced


def replace_stacks(
    model: "PreTrainedModel", stacks: Mapping[str, Any], quantization: Quantization | None
) -> list[CompressedExperts]:
    """Replace every named stack of experts of an empty model by factors; return the replacements.

    Names are looked up like those of linears.
    """
    modules = dict(model.named_modules())
    wanted: dict[str, dict[str, StackFacts]] = {}
    for name, facts in stacks.items():
        path, _, leaf = name.rpartition(".")
        own_path = _find_module(model, path, modules)
        if own_path is not None:
            wanted.setdefault(own_path, {})[leaf] = StackFacts.model_validate(facts)
    return [compress_experts(name, modules[name], facts, quantization) for name, facts in wanted.items()]


def _find_module(model: "PreTrainedModel", name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return a module's name in this class, with or without the base model's prefix; None if outside the base model.

    Raises `InputError` if a module of the base model is missing.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # diffusers has none
    match = next((known for known in (name, name.removeprefix(prefix), prefix + name) if known in modules), None)
    if match is None and name.startswith(prefix):
        raise InputError(f"config.json: quantization_config.ranks names {name}, which {type(model).__name__} lacks")
    return match


def _compressed(
    name: str,
    module: nn.Module,
    rank: int | None,
    quantization: Quantization | None,
    code: CodeShape | None,
) -> CompressedLinear:
    """Build the empty replacement of a linear, or of GPT-2's `Conv1D`, whose weight is (in, out), on its device."""
    if not isinstance(module, nn.Linear | Conv1D):
        raise InputError(f"config.json: quantization_config.ranks names {name}, which is a {type(module).__name__}")
    weight: torch.Tensor = module.weight
    features = tuple(weight.shape) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])
    common: dict[str, Any] = {
        "in_features": features[0],
        "out_features": features[1],
        "bias": module.bias is not None,
        "device": weight.device,
        "dtype": weight.dtype,
        "was_conv1d": isinstance(module, Conv1D),
    }
    compressed: CompressedLinear
    if quantization is not None and code is not None:
        compressed = CodedLinear(code, rank, quantization, **common)
    elif quantization is not None:
        compressed = QuantizedLinear(rank=rank, quantization=quantization, **common)
    elif rank is not None:
        compressed = LowRankLinear(rank=rank, **common)
    else:
        raise InputError(f"config.json: quantization_config: {name} is quantized whole, in no known factor_dtype")
    # transformers' initializer, which would write to `weight`, skips a module with this mark.
    compressed._is_hf_initialized = True  # type: ignore[assignment]
    return compressed


def _check_folder(model: "PreTrainedModel", checkpoint_files: list[str]) -> None:
    """Refuse files outside the model's folder, which an index can name."""
    folders = {Path(os.path.normpath(Path(file).absolute())).parent for file in checkpoint_files}
    given = model.name_or_path or ""
    own = Path(os.path.normpath(Path(given).absolute()))
    outside = Path(given).is_dir() and given != "" and not all(folder.is_relative_to(own) for folder in folders)
    if outside or len(folders) > 1:
        raise InputError(f"{sorted(folders)[0]}: the index names files outside the folder; compile the emulator again")


def _check_factors(checkpoint_files: list[str], factors: list[str]) -> None:
    """Refuse fewer tensors than `factors`, the names of what the modules need: transformers would leave them empty."""
    names = [name for file in checkpoint_files for name in _tensor_names(file)]
    for factor, needed in Counter(factors).items():
        stored = sum(name.endswith(f".{factor}") for name in names)
        if checkpoint_files and stored < needed:
            raise InputError(
                f"{Path(checkpoint_files[0]).parent}: {needed} modules need a tensor named *.{factor} and the files "
                f"hold {stored}; copy the emulator again"
            )


def _tensor_names(file: str) -> list[str]:
    with safe_open(file, framework="pt") as header:
        return list(header.keys())
