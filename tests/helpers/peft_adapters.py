"""Random LoRA adapters made and saved by PEFT itself, which is the oracle of what they compute."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from onelayer.compiler.adapters.reader import Adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load_original(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a saved model, resident, in evaluation mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    loaded: PreTrainedModel = model.eval()
    return loaded


def quiet_peft(model: PreTrainedModel, **config: Any) -> PeftModel:
    """Call `get_peft_model`, without its advice on embeddings, ties and Conv1D."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **config}))
    assert isinstance(adapted, PeftModel)
    return adapted.eval()


def random_adapter(
    model: PreTrainedModel, directory: str | Path, *, seed: int = 1, size: float = 0.3, **config: Any
) -> PeftModel:
    """Attach a LoRA to `model`, fill everything trainable with noise, save it; return the adapted model."""
    adapted = quiet_peft(model, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(directory))
    return adapted


def load_adapter(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """Call `PeftModel.from_pretrained`; a warning about the adapter (such as keys that do not match) is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's own
        return PeftModel.from_pretrained(model, str(directory)).eval()


def folded(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and scaled B of every module, as `write_adapter` takes them."""
    parts = {name: adapter.factors(name) for name in adapter.modules}
    return {name: (a, adapter.modules[name].scaling * b) for name, (a, b) in parts.items()}


def deltas(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Compute what PEFT would add to each adapted weight, by module name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.r
    }
