"""Target modules as a person names them in, those that plain LoRA can adapt out."""

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from onelayer.compiler.errors import InputError


def linear_targets(model: nn.Module, target_modules: str | list[str]) -> str | list[str]:
    """Targets that adapt linear modules only: the given ones, or on a mixture the linears that "all-linear" means.

    PEFT takes "all-linear" and the names of experts to mean, too, the stacked parameters that experts became in
    transformers 5. LoRA on those is no pair of factors per linear, so it could not be corrected for the original.
    Raises `InputError` where they are named.
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
