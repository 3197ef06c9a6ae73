"""A model directory in, what it takes to stream it out: its class, its dtype, and its weights as plain tensors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from onelayer.compiler.dequantize.checkpoint import unpacked
from onelayer.compiler.models import transformers_models
from onelayer.compiler.models.construction import modules_limit
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.model_config import read_model_config
from onelayer.compiler.storage.safetensors_format import TORCH_NAMES


@dataclass(frozen=True)
class Original:
    """An original: packed weights of its `checkpoint` are unpacked in `dtype`."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    dtype: torch.dtype
    checkpoint: Checkpoint

    @classmethod
    def open(cls, directory: str | Path) -> "Original":
        """Open `directory`. Raises `InputError` where checkpoint or class cannot be streamed, naming what and why."""
        stored = Checkpoint.open(directory)
        config = transformers_models.read_config(stored.directory)
        model_class = transformers_models.model_class(config, stored.directory)
        dtype = transformers_models.compute_dtype(config, stored)
        name = TORCH_NAMES[str(dtype).removeprefix("torch.")]
        if not stored.is_gguf:
            return cls(config, model_class, dtype, unpacked(stored, read_model_config(stored.directory), name))
        from onelayer.compiler.dequantize.gguf import named_by_transformers

        limit = modules_limit(len(stored.tensors))
        empty = transformers_models.empty_model(config, model_class, dtype, limit)
        return cls(config, model_class, dtype, named_by_transformers(stored, empty, name))
