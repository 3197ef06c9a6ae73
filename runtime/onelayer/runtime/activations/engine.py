"""What runs in the place of a decoder layer's forward: the layer, recomputed in backward from compressed activations.

`layer`: the whole layer from its compressed input. `sublayer`: each norm output is compressed once, and serves the
norm's own backward and the recomputation of the attention or MLP that reads it. A layer without such norms falls back.
A layer that holds layers, like a stage of Swin, runs as it is: those inside it are recomputed, each by itself.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from onelayer.compiler.libraries.transformers_models import holds_layers
from onelayer.runtime.activations.layer_plan import LayerPlan, plan_layer
from onelayer.runtime.activations.norms import CompressedNorm, Norm, NormCopy
from onelayer.runtime.activations.padding import PaddingMask
from onelayer.runtime.activations.recompute import StandIn, checkpointed_call, replaced, tensors_in
from onelayer.runtime.activations.routing import Routing
from onelayer.runtime.activations.stored_copies import StoredCopies

Where = Literal["layer", "sublayer"]


def has_trainable(module: nn.Module) -> bool:
    """Whether any parameter in it is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


class ActivationEngine:
    """Runs the layers of `model`. Transformers calls `run` instead of its checkpoint function.

    `fell_back(name, reason)` hears of each layer that is recomputed as a whole although `where` is "sublayer".
    """

    def __init__(
        self, model: nn.Module, copies: StoredCopies, where: Where, fell_back: Callable[[str, str], None]
    ) -> None:
        self.copies, self.where, self.fell_back = copies, where, fell_back
        self.plans: dict[str, LayerPlan | str] = {}
        self.padding = PaddingMask(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._running: nn.Module | None = None
        self._chooses: dict[nn.Module | None, bool] = {}
        self._patched: list[tuple[nn.Module, Any]] = []
        self._plans_of_makes: dict[tuple[Any, ...], LayerPlan | str] = {}

    def remove(self) -> None:
        """Give every module its own forward back."""
        self.padding.remove()
        for module, own in reversed(self._patched):
            if own is None:
                del module.forward
            else:
                module.forward = own

    def run(self, call: Any, *args: Any) -> Any:
        """Run `call(*args)`; `call` is a layer's forward with its keyword arguments bound, or the layer itself."""
        kwargs: dict[str, Any] = {}
        if isinstance(call, partial):
            call, args, kwargs = call.func, (*call.args, *args), dict(call.keywords)
        named = (call, *args, getattr(call, "__self__", None))
        layer = next((value for value in named if isinstance(value, nn.Module)), None)
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point() and tensor.ndim > 1]
        needed = layer is None or has_trainable(layer) or any(tensor.requires_grad for tensor in given)
        if not given or not needed or not torch.is_grad_enabled() or (layer is not None and holds_layers(layer)):
            return call(*args, **kwargs)
        if layer is not None and self.where == "sublayer":
            plan = self._plan(layer, call, given[0], args, kwargs)
            if isinstance(plan, LayerPlan):
                self._running, outer = layer, self._running
                try:
                    return call(*args, **kwargs)
                finally:
                    self._running = outer
        return self._recompute(call, args, kwargs, self._layer_inputs(layer, given), layer)

    def _plan(
        self, layer: nn.Module, call: Callable[..., Any], hidden: torch.Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> LayerPlan | str:
        """Find out in a layer's first call how it is built; layers of one make share the answer."""
        # A layer that was added to the model later has no name in it.
        name = self._names.setdefault(layer, f"{type(layer).__name__} {len(self._names)}")
        if name not in self.plans:

            def once(stranger: torch.Tensor) -> Any:
                given = replaced((args, kwargs), torch.Tensor, lambda tensor: stranger if tensor is hidden else tensor)
                return call(*given[0], **given[1])

            shared = [tensor for tensor in tensors_in((args, kwargs)) if tensor is not hidden]
            make = tuple((part, type(module)) for part, module in layer.named_modules())
            if make not in self._plans_of_makes:
                self._plans_of_makes[make] = plan_layer(layer, once, hidden, shared)
            plan = self.plans[name] = self._plans_of_makes[make]
            if isinstance(plan, str):
                self.fell_back(name, plan)
            else:
                self._install(layer, name, plan)
        return self.plans[name]

    def _install(self, layer: nn.Module, name: str, plan: LayerPlan) -> None:
        """Put our forward into the norms and sub-blocks of a layer."""
        for part, norm in plan.norms.items():
            module = layer.get_submodule(part)
            self._patch(module, partial(self._norm, layer, f"{name}.{part}", module, norm, module.forward))
        for part in plan.blocks:
            module = layer.get_submodule(part)
            self._patch(module, partial(self._block, layer, module, module.forward))

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._patched.append((module, vars(module).get("forward")))
        module.forward = forward

    def _norm(
        self, layer: nn.Module, name: str, module: nn.Module, norm: Norm, forward: Callable[..., Any], x: torch.Tensor
    ) -> torch.Tensor:
        """Run a norm of a layer that runs in sub-layers: its exact output, and a compressed copy that belongs to it."""
        if self._running is not layer:
            return forward(x)  # type: ignore[no-any-return]
        normalized, inverse = norm.normalize(x)
        stored = self.copies.compress(normalized, name, "norm outputs", self.padding.tokens(x))
        del normalized
        output: torch.Tensor
        if x.requires_grad or has_trainable(module):
            self.copies.count("inverse norms", inverse.numel() * inverse.element_size())
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            output = CompressedNorm.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, forward, norm, stored, inverse
            )
        else:
            output = forward(x)
        # Its precision may differ from that of x: autocast and norms in float32 make it wider.
        self.copies.remember(output, NormCopy(stored, norm, module, output.dtype))
        return output

    def _block(
        self, layer: nn.Module, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a sub-block of a layer that runs in sub-layers; recompute it from the copies of the norms it reads."""
        given = list(tensors_in((args, kwargs)))
        copies = {id(tensor): copy for tensor in given if (copy := self.copies.copy_of(tensor)) is not None}
        needed = has_trainable(module) or any(tensor.requires_grad for tensor in given)
        if self._running is not layer or not copies or not needed:
            return forward(*args, **kwargs)
        return self._recompute(forward, args, kwargs, copies, module)

    def _layer_inputs(self, layer: nn.Module | None, given: list[torch.Tensor]) -> dict[int, StandIn]:
        """Compress the hidden state of a layer, and other inputs of its width that carry a gradient.

        Those others (an encoder's output, which every layer of a decoder reads) are compressed once for all layers.
        """
        hidden, *others = given
        name = self._names.get(layer, "") if layer is not None else ""
        stand_ins: dict[int, StandIn] = {}
        for tensor in [hidden, *(t for t in others if t.requires_grad and t.shape[-1] == hidden.shape[-1])]:
            copy = None if tensor is hidden else self.copies.copy_of(tensor)
            if copy is not None:
                stand_ins[id(tensor)] = copy
                continue
            tokens = self.padding.tokens(tensor) if tensor is hidden else None
            stand_ins[id(tensor)] = compressed = self.copies.compress(tensor, name, "layer inputs", tokens)
            if tensor is not hidden:
                self.copies.remember(tensor, compressed)
        return stand_ins

    def _recompute(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stand_ins: Mapping[int, StandIn],
        owner: nn.Module | None,
    ) -> Any:
        """Run the call and keep only the stand-ins; repeat its discrete choices in backward, if it makes any."""
        routing = Routing() if self._chooses.get(owner, True) else None
        for tensor in tensors_in(kwargs):
            if id(tensor) not in stand_ins:
                self.copies.count_shared(tensor)
        result = checkpointed_call(call, args, kwargs, stand_ins, routing)
        if routing is not None:
            self._chooses[owner] = routing.has_choices
            self.copies.count("routing", routing.saved_bytes)
        return result
