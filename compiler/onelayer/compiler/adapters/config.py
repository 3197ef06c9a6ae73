"""The adapter_config.json of a PEFT LoRA: checked fields come out, and every variant that is not plain LoRA is named.

Plain means that the adapted weight is W + s B A, with the scaling s known from the file. The variants refused here
either compute something else or have changed W itself, so their A and B would give wrong numbers without an error.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from onelayer.compiler.documents import checked_document
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json

CONFIG_FILE = "adapter_config.json"

# Fields that turn LoRA into something else when set (peft 0.21, LoraConfig), with the name their users know.
VARIANT_FIELDS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias (a bias in B)",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron-parallel LoRA",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
}
# Values of init_lora_weights that subtract something from the base weight or depend on it.
VARIANT_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
    "mica": "MiCA",
}
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
# Fields that do not change what a trained adapter computes: its history, its training, or where PEFT attaches it.
INERT_FIELDS = {
    *("auto_mapping", "peft_version", "inference_mode", "exclude_modules", "lora_dropout", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "use_qalora", "qalora_group_size", "runtime_config"),
}
Rank = Annotated[int, Field(gt=0)]


class AdapterConfig(BaseModel):
    """The fields that say what a plain LoRA computes; the rest is checked by name and dropped."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="ignore", strict=True)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives to a module."""
        return int(_matched(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str, rank: int) -> float:
        """Return the factor s in W + s B A: alpha / r or, with rank stabilization, alpha / sqrt(r), per module."""
        alpha = float(_matched(self.alpha_pattern, module, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matched(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """Look up a module in a rank or alpha pattern, by PEFT's own matching."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    value: float = pattern.get(get_pattern_key(list(pattern), module), default)
    return value


def read_config(directory: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`. Raises `InputError` naming the field, or the variant that is not LoRA."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the directory of a PEFT LoRA adapter")
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a table of fields; restore the file")
    peft_type = document.get("peft_type")
    if peft_type != "LORA":
        raise InputError(f"{path}: field peft_type is {peft_type!r}; only LORA adapters can be read")
    _refuse_variants(path, document)
    return checked_document(AdapterConfig, document, path, "correct it")


def _refuse_variants(path: Path, document: dict[str, Any]) -> None:
    remedy = "train plain LoRA instead"
    for field, variant in VARIANT_FIELDS.items():
        if document.get(field) not in (None, False, [], {}):
            raise InputError(f"{path}: field {field}: {variant} is not plain LoRA and is not supported; {remedy}")
    init = document.get("init_lora_weights", True)
    for prefix, variant in VARIANT_INITS.items():
        if isinstance(init, str) and init.lower().startswith(prefix):
            raise InputError(
                f"{path}: field init_lora_weights is {init!r}: {variant} builds on the base weight; {remedy}"
            )
    if init not in PLAIN_INITS:
        raise InputError(f"{path}: field init_lora_weights is {init!r}, which is not known here; {remedy}")
    known = AdapterConfig.model_fields.keys() | INERT_FIELDS
    for field, value in document.items():
        if field not in known and value not in (None, False, [], {}, ""):
            raise InputError(
                f"{path}: field {field} is not known here and may change what the adapter computes; "
                "remove it if it does not"
            )
