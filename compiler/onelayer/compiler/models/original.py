"""A model directory in, what it takes to stream it out: its class, its dtype, and its weights as plain tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.dequantize.checkpoint import unpacked
from onelayer.compiler.libraries.construction import modules_limit
from onelayer.compiler.libraries.library import Library, library_of
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.model_config import read_model_config
from onelayer.compiler.storage.safetensors_format import TORCH_NAMES


@dataclass(frozen=True)
class Original:
    """An original of `library`: packed weights of its `checkpoint` are unpacked in `dtype`."""

    library: Library
    config: Any
    model_class: Any
    dtype: torch.dtype
    checkpoint: Checkpoint

    @classmethod
    def open(cls, directory: str | Path) -> "Original":
        """Open `directory`. Raises `InputError` where checkpoint or class cannot be streamed, naming what and why."""
        stored = Checkpoint.open(directory)
        library = library_of(stored.directory)
        config = library.read_config(stored.directory)
        model_class = library.model_class(config, stored.directory)
        dtype = library.compute_dtype(config, stored)
        name = TORCH_NAMES[str(dtype).removeprefix("torch.")]
        if not stored.is_gguf:
            return cls(library, config, model_class, dtype, unpacked(stored, read_model_config(stored.directory), name))
        from onelayer.compiler.dequantize.gguf import named_by_transformers

        limit = modules_limit(len(stored.tensors))
        empty = library.empty_model(config, model_class, dtype, limit)
        return cls(library, config, model_class, dtype, named_by_transformers(stored, empty, name))
