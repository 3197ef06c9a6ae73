"""Which tokens of a batch are no padding: read off the attention mask that the model is called with."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel


class PaddingMask:
    """The mask of the innermost transformers model that is running, by hooks on all of them within `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._masks: list[torch.Tensor | None] = []
        # One mask serves all layers of a batch; looking for its zeros waits for the device, so it is done once.
        self._tokens: Any = WeakTensorKeyDictionary()
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Indices of the tokens of `hidden` (..., n), flattened, that are no padding; None where all count."""
        mask = self._masks[-1] if self._masks else None
        if mask is None or hidden.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return None
        if mask not in self._tokens:
            self._tokens[mask] = mask.flatten().nonzero().flatten().to(hidden.device)
        tokens: torch.Tensor = self._tokens[mask]
        return tokens if 0 < len(tokens) < mask.numel() else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        # Masks with more dimensions say who attends to whom, and float ones are added to scores.
        usable = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point()
        self._masks.append(mask if usable else None)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._masks.pop()
