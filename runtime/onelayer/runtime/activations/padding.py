"""Which tokens of a batch are no padding: read off the attention mask that the model is called with.

A token that is masked but has a label is none either: its loss is part of the gradient.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_NO_LABEL = -100  # what transformers' losses leave out


@dataclass
class _Call:
    """A call that is going on: its mask, its labels and, once looked for, the tokens that are no padding.

    One mask serves all layers, and looking for its zeros waits for the device, so it is done once a call. Not once a
    mask: a loop may fill the same buffer with batch after batch.
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
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Indices of the tokens of `hidden` (..., n), flattened, that are no padding; None where all count."""
        call = self._calls[-1] if self._calls else _Call()
        if call.mask is None or hidden.shape[:-1] not in (call.mask.shape, (call.mask.numel(),)):
            return None
        if call.tokens is None:
            call.tokens = self._counting(call.mask).flatten().nonzero().flatten()
        # Layers of one model may lie on several devices.
        if call.tokens.device != hidden.device:
            call.tokens = call.tokens.to(hidden.device)
        return call.tokens if 0 < len(call.tokens) < call.mask.numel() else None

    def _counting(self, mask: torch.Tensor) -> torch.Tensor:
        """Whether each token counts, of the shape of the mask."""
        counting = mask != 0
        # The model that computes the loss may lie around the one that has the layers.
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
        # Masks with more dimensions say who attends to whom, and float ones are added to scores.
        usable = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point()
        self._calls.append(_Call(mask if usable else None, labels if isinstance(labels, torch.Tensor) else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.pop()
