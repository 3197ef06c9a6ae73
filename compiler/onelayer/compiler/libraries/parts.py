"""A model of several models in; its language model, and the projectors that lead to it, out. No family is known."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.libraries.modules import has_forward


def language_model(model: nn.Module) -> str | None:
    """Return the name of the language model inside a model of several; None if all of it is one."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config.is_encoder_decoder or config.get_text_config() is config:
        return None
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(model, "get_decoder") else model
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def projectors(model: PreTrainedModel, layers: Collection[nn.Module]) -> frozenset[nn.Module]:
    """Find what stands between the towers of a model of several and its language model: linears outside of `layers`.

    These are the largest modules after the first layer of a tower that run, hold a linear and hold no layer; what
    embeds patches or samples comes before.
    """
    name = language_model(model)
    if name is None:
        return frozenset()
    outside = {model.get_submodule(name), model.get_output_embeddings()}
    return frozenset(_after_layers(model, layers, outside))


def _after_layers(model: nn.Module, layers: Collection[nn.Module], outside: Collection[Any]) -> Iterator[nn.Module]:
    reached = False

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        nonlocal reached
        if module in outside:
            return
        reached = reached or module in layers
        if module in layers:
            return
        holds_layers = any(part in layers for part in module.modules())
        if not holds_layers and has_forward(module):
            if reached and any(isinstance(part, nn.Linear | Conv1D) for part in module.modules()):
                yield module
            return
        for child in module.children():
            yield from visit(child)

    yield from visit(model)
