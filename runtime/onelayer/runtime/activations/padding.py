"""Finds the real (non-padding) tokens of a batch from the attention mask.

A masked token with a label counts as real: its loss contributes to the gradient.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_NO_LABEL = -100  # the label that transformers' losses ignore


@dataclass
class _Call:
    """A running call: its mask, its labels and, after the first search, its real tokens.

    One mask serves all layers, and the search for its zeros waits for the device, so it is done once per call. It is
    not done once per mask, since a loop may fill the same buffer with every batch.
    """

    mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


class PaddingMask:
    """The mask of the innermost transformers model that is running, by hooks on all of them within `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[_Call] = []
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return the flattened indices of the real tokens of `hidden` (..., n); None if all are real."""
        call = self._calls[-1] if self._calls else _Call()
        if call.mask is None or hidden.shape[:-1] not in (call.mask.shape, (call.mask.numel(),)):
            return None
        if call.tokens is None:
            call.tokens = self._counting(call.mask).flatten().nonzero().flatten()
        # Layers of one model may be on several devices.
        if call.tokens.device != hidden.device:
            call.tokens = call.tokens.to(hidden.device)
        return call.tokens if 0 < len(call.tokens) < call.mask.numel() else None

    def _counting(self, mask: torch.Tensor) -> torch.Tensor:
        """Return whether each token is real, in the shape of the mask."""
        counting = mask != 0
        # The model that computes the loss may contain the model that has the layers.
        for labels in [call.labels for call in self._calls if call.labels is not None]:
            if labels.shape == mask.shape:
                labeled = (labels != _NO_LABEL).to(mask.device)
                counting |= labeled
                # Decoders predict a label at the token before it.
                counting[:, :-1] |= labeled[:, 1:]
        return counting

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs
        mask, labels = given.get("attention_mask"), given.get("labels")
        # Masks with more dimensions say which tokens attend to which; float masks are added to scores.
        usable = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point()
        self._calls.append(_Call(mask if usable else None, labels if isinstance(labels, torch.Tensor) else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.pop()
