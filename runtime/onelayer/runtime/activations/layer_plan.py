"""One decoder layer and the arguments of a call in; its norms and the sub-blocks that read them out, or a reason.

Nothing is looked up by name. The layer runs once on its real arguments and keeps nothing. A leaf module that computes a
normalization is a norm, and a module that receives a norm's output is a sub-block. What autograd would still keep
outside norms and sub-blocks decides whether the layer has this pattern.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onelayer.compiler.machine.devices import forked_random
from onelayer.runtime.activations.norms import Norm, recognize
from onelayer.runtime.activations.recompute import tensors_in

# A layer that would keep more than this share of the hidden state outside sub-blocks does not have the pattern.
_LEFTOVER_SHARE = 0.5


@dataclass(frozen=True)
class LayerPlan:
    """Names inside a layer: its norms and their form, and the modules to recompute from a norm's output."""

    norms: dict[str, Norm]
    blocks: tuple[str, ...]


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage, which tells live storages apart."""
    return tensor.untyped_storage().data_ptr()


def plan_layer(
    layer: nn.Module, call: Callable[[torch.Tensor], Any], hidden: torch.Tensor, shared: Sequence[torch.Tensor]
) -> LayerPlan | str:
    """Run `layer` once by `call(hidden)` and return its plan, or the reason why it has none.

    `shared` are the layer's other inputs, which all layers share: masks, positions, an encoder's output.

    The run leaves no trace: random state is restored, nothing is kept for backward, and it happens in an empty context,
    so that transformers' recorders of router logits and hidden states do not see it.
    """
    trace = _Trace(layer, list(shared))
    with forked_random(hidden.device), trace.watching():
        # With a gradient, as if a trained layer came before it, the first layer is judged like the others.
        contextvars.Context().run(call, hidden.detach().requires_grad_())
    if not trace.blocks:
        return "no norm feeds a sub-block"
    if trace.leftover_bytes > _LEFTOVER_SHARE * hidden.numel() * hidden.element_size():
        return f"{trace.leftover_bytes} bytes in a call would be kept besides what its norms feed"
    return LayerPlan(trace.norms, tuple(trace.blocks))


@dataclass
class _Trace:
    """The trace of one run of a layer. `owner` is the norm candidate or sub-block that is running, if any."""

    layer: nn.Module
    shared: list[torch.Tensor]
    norms: dict[str, Norm] = field(default_factory=dict)
    blocks: dict[str, None] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    owner: nn.Module | None = None
    owned: list[torch.Tensor] = field(default_factory=list)
    leftovers: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def leftover_bytes(self) -> int:
        """The bytes that autograd would keep outside norms and sub-blocks."""
        lasting = (*self.layer.parameters(), *self.layer.buffers(), *self.shared)
        resident = {storage_of(tensor) for tensor in lasting}
        kept = {pointer: tensor for pointer, tensor in self.leftovers.items() if pointer not in resident}
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put hooks on every module and on all tensors that autograd saves; remove them on exit."""
        handles = []
        for name, module in self.layer.named_modules():
            if module is not self.layer:
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(name)))
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._saved, _never):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _saved(self, tensor: torch.Tensor) -> None:
        if self.owner is None:
            self._leave_over([tensor])
        elif self.owner not in self._block_modules:
            self.owned.append(tensor.detach())

    @property
    def _block_modules(self) -> list[nn.Module]:
        return [self.layer.get_submodule(name) for name in self.blocks]

    def _leave_over(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            # Held, so that no later tensor gets the same address.
            self.leftovers.setdefault(storage_of(tensor), tensor.detach())

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.owner is not None:
                return
            given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
            leaf = next(module.children(), None) is None
            if not leaf and any(tensor is output for tensor in given for output in self.outputs):
                self.owner = module
                self.blocks[name] = None
                # Other values that this layer computed for the sub-block must be kept for its recomputation.
                self._leave_over([t for t in given if t.grad_fn is not None and not self._is_output(t)])
            elif leaf and len(given) == 1:
                self.owner = module

        return hook

    def _is_output(self, tensor: torch.Tensor) -> bool:
        return any(tensor is output for output in self.outputs)

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.owner is not module:
                return
            self.owner = None
            if name in self.blocks:
                return
            norm = None
            if isinstance(output, torch.Tensor) and len(args) == 1 and isinstance(args[0], torch.Tensor):
                norm = recognize(module, args[0], output)
            if norm is None:
                self._leave_over(self.owned)
            else:
                self.norms[name] = norm
                self.outputs.append(output)
            self.owned = []

        return hook


def _never(nothing: None) -> torch.Tensor:
    raise AssertionError("nothing is kept in a trial run, so nothing can be asked for")
