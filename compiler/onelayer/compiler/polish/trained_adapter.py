"""The adapter that exact steps train: a given or a fresh one, attached to the empty model by PEFT itself."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapters.attach import Adapted, adapted_model, factor_names, linear_targets, short_targets
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.adapters.writer import Base, write_adapter
from onelayer.compiler.data.classes import is_classifier
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.devices import forked_random
from onelayer.compiler.machine.transfers import on_host, upload
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.polish.resume import Parameters

NAME = "default"


@dataclass(frozen=True)
class FreshAdapter:
    """A LoRA adapter that does not exist yet; it leaves out a classifier's head."""

    rank: int
    alpha: float
    target_modules: str | list[str]
    seed: int

    def write(self, directory: Path, model: Path) -> None:
        """Write the adapter as PEFT initializes it (B is zero), from a private generator.

        Raises `InputError` if the targets name nothing that can be adapted.
        """

        def prepare(empty: Any) -> None:
            generates = hasattr(empty, "can_generate") and empty.can_generate() and not empty.config.is_encoder_decoder
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions, and says int
                target_modules=linear_targets(empty, self.target_modules),
                task_type="CAUSAL_LM" if generates else None,
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in empty.modules()),
                exclude_modules=list(SEQ_CLS_HEAD_NAMES) if is_classifier(type(empty)) else None,
            )
            with forked_random(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT's, about Conv1D and ties
                torch.manual_seed(self.seed)
                try:
                    adapted = get_peft_model(empty, config)
                except ValueError as error:
                    names = self.target_modules
                    given = names if isinstance(names, str) else ",".join(names)
                    raise InputError(f"--target-modules {given}: {str(error).splitlines()[0]}") from None
                adapted.save_pretrained(str(directory), save_embedding_layers=False)

        StreamedModel(model, prepare)


def attach_trainable(model: Path, adapter: Adapter, device: torch.device) -> tuple[Adapted, Parameters]:
    """Attach `adapter` to the original; return it and A and B of every adapted module, float32, on `device`.

    Other replaced parameters are held with it and do not change. Raises `InputError` if the adapter does not fit.
    """
    adapted = adapted_model(model, {NAME: adapter})
    streamed = adapted.streamed
    for parameter in streamed.model.parameters():
        if type(parameter) is torch.nn.Parameter:  # stand-ins never require gradients
            parameter.requires_grad_(False)
    trained: Parameters = {}
    for name, module in adapter.modules.items():
        for key in factor_names(name, module.embedding, NAME):
            parameter = streamed.model.get_parameter(key)
            parameter.data = upload(parameter.data.to(torch.float32), device)
            parameter.requires_grad_(True)
            trained[key] = parameter
    return adapted, trained


def factors_of(adapter: Adapter, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A (r, in) and B (out, r) of every module, with the scaling in B, from trained parameters by name."""
    factors, tensors = {}, on_host(tensors)
    for name, module in adapter.modules.items():
        a, b = (tensors[key] for key in factor_names(name, module.embedding, NAME))
        factors[name] = (a, module.scaling * b)
    return factors


def write_polished(
    directory: Path,
    adapter: Adapter,
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    base: Base,
    record: dict[str, Any],
) -> None:
    """Write the trained parameters as an adapter of the original, in a form that every loader scales alike."""
    factors = factors_of(adapter, tensors)
    assert all(math.isfinite(float(part.sum())) for pair in factors.values() for part in pair)
    origin = {
        "digest": adapter_digest(adapter.directory),
        "corrected": bool((adapter.provenance or {}).get("corrected")),
    }
    provenance = {"kind": "adapter", "corrected": True, "polished": True, "source_adapter": origin, **record}
    targets = short_targets(model, adapter.modules)
    write_adapter(directory, factors, source=adapter, base=base, targets=targets, provenance=provenance)
