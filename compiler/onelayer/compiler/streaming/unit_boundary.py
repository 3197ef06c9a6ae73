"""The cuts between units in a graph of gradients: what a unit takes in and gives out, without what lies inside it.

The code in front of a unit and behind it builds graphs of its own. A unit's inputs are kept as plain values, each with
the place in the graph in front that its gradient belongs to; its outputs are the beginnings of the graph behind, where
gradients are caught as they arrive. The inside exists only while the unit is run again.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import Cache, EncoderDecoderCache

from onelayer.compiler.factors.activation_factors import ActivationFactors, Compressed
from onelayer.compiler.factors.activation_factors import ExactTensor as Unfactored
from onelayer.compiler.models.lazy_tensors import DeferredLogits
from onelayer.compiler.models.units import Unit

Slots = list[torch.Tensor | None]


def differentiable(values: Any) -> list[torch.Tensor]:
    """The tensors of a tree that can have gradients, each once, in the order of the tree.

    Logits that are not formed yet count by the hidden states that they are of.
    """
    leaves = (leaf.hidden if isinstance(leaf, DeferredLogits) else leaf for leaf in tree_leaves(values))
    found = {
        id(tensor): tensor
        for tensor in leaves
        if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())
    }
    return list(found.values())


def _replaced(values: Any, others: dict[int, torch.Tensor]) -> Any:
    """A tree with some of its differentiable tensors replaced, by identity."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DeferredLogits):
            return tensor.over_other(others.get(id(tensor.hidden), tensor.hidden))
        return others.get(id(tensor), tensor)

    return tree_map_only(torch.Tensor, other, values)


class _Seam(torch.autograd.Function):
    """Values without history in, the same values as the beginning of a graph out; gradients end in `slots`."""

    @staticmethod
    def forward(ctx: Any, slots: Slots, anchor: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.slots = slots
        ctx.set_materialize_grads(False)
        # `.data` is no view to autograd, so that the model's code may change it in place as it may any output.
        return tuple(value.data for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                before = ctx.slots[place]
                ctx.slots[place] = gradient.detach() if before is None else before + gradient
        return (None,) * (len(gradients) + 2)


def cut_graph(outputs: Any) -> tuple[Any, Slots]:
    """The outputs of a unit as beginnings of a graph, and the slots that catch their gradients."""
    tensors = differentiable(outputs)
    slots: Slots = [None] * len(tensors)
    if not tensors:
        return outputs, slots
    with torch.enable_grad():
        begun = _Seam.apply(slots, torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
    return _replaced(outputs, dict(zip(map(id, tensors), begun, strict=True))), slots


# What is kept of a tensor in its stead.
Shrink = Callable[[torch.Tensor], Compressed]


@dataclass
class UnitInputs:
    """The arguments of one call of a unit without their history, and where their gradients go.

    `arguments` is the tree of them, compressed tensors in place of some. `edges[i]` belongs to the i-th differentiable
    tensor; None where nothing in front of it wants a gradient.
    """

    arguments: Any
    edges: list[GradientEdge | None]
    versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Any, known: WeakTensorKeyDictionary, shrink: Shrink | None = None) -> "UnitInputs":
        """Keep `arguments`. `known` maps tensors met before to what was kept of them, so that shared ones stay so.

        With `shrink`, that is what is kept of tensors whose gradient is wanted.
        """
        leaves, tree = tree_flatten(arguments)
        edges = [get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in differentiable(arguments)]
        for place, leaf in enumerate(leaves):
            if type(leaf) is torch.Tensor:
                if leaf not in known:
                    known[leaf] = shrink(leaf) if shrink is not None and leaf.requires_grad else leaf.detach()
                leaves[place] = known[leaf]
        return cls(tree_unflatten(leaves, tree), edges, _versions(leaves))

    @property
    def wants_gradients(self) -> bool:
        """Whether anything in front of the unit wants a gradient."""
        return any(edge is not None for edge in self.edges)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory."""
        found: list[torch.Tensor] = []
        for leaf in tree_leaves(self.arguments):
            if isinstance(leaf, ActivationFactors | Unfactored):
                found += leaf.tensors
            elif isinstance(leaf, torch.Tensor):
                found.append(leaf)
        return found

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` where an input was changed in place after the unit had read it."""
        if self.versions != _versions(tree_leaves(self.arguments)):
            raise RuntimeError("an input was changed in place after the unit had read it, so it cannot be run again")

    def rebuild(self, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
        """The arguments on `device` for another run, and those leaves whose gradients `send_gradients` takes."""
        rebuilt: dict[int, torch.Tensor] = {}

        def plain(leaf: Any) -> Any:
            if isinstance(leaf, ActivationFactors | Unfactored):
                if id(leaf) not in rebuilt:
                    rebuilt[id(leaf)] = leaf.rebuild()
                return rebuilt[id(leaf)]
            return leaf

        arguments = tree_map(plain, self.arguments)
        originals = differentiable(arguments)
        leaves = [
            tensor.to(device).detach().requires_grad_(edge is not None)
            for tensor, edge in zip(originals, self.edges, strict=True)
        ]
        arguments = _replaced(arguments, dict(zip(map(id, originals), leaves, strict=True)))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments), leaves

    def send_gradients(self, leaves: list[torch.Tensor]) -> None:
        """Send the gradients of the leaves through the graph in front of the unit, into the slots of earlier units."""
        pairs = [
            (edge, leaf.grad.cpu())
            for edge, leaf in zip(self.edges, leaves, strict=True)
            if edge is not None and leaf.grad is not None
        ]
        if pairs:
            edges, gradients = zip(*pairs, strict=True)
            # Several units may share a piece of graph, so it is kept; it goes when the last of them is done.
            torch.autograd.backward(edges, gradients, retain_graph=True)


def rerun(unit: Unit, kept: UnitInputs, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a resident unit again; return its differentiable outputs and the leaves for `send_gradients`."""
    (arguments, contents), leaves = kept.rebuild(device)
    outputs = call_with_containers(lambda args, kwargs: unit.forward(*args, **kwargs), arguments, contents)
    return differentiable(outputs), leaves


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, torch.Tensor)]


CACHES = (Cache, EncoderDecoderCache)

Contents = list[dict[Any, Any]]


def containers_of(arguments: Any) -> list[UserDict[Any, Any]]:
    """The containers among some arguments, each once. Plain dicts are trees to torch, and rebuilt wherever they go."""
    found = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, UserDict)}
    return list(found.values())


def with_contents(arguments: Any) -> tuple[Any, Contents]:
    """Arguments, and what lies in their containers now."""
    return arguments, [dict(container) for container in containers_of(arguments)]


def with_own_containers(arguments: Any, contents: Contents) -> tuple[Any, list[UserDict[Any, Any]]]:
    """The arguments with containers of their own that hold `contents`, and these.

    A cache that some models make against their configuration is handed out anew and empty, as it was: a unit that runs
    twice would find its own keys and values in it.
    """
    originals = containers_of(arguments)
    fresh = [type(container)(content) for container, content in zip(originals, contents, strict=True)]
    by_identity: dict[int, Any] = dict(zip(map(id, originals), fresh, strict=True))

    def own(leaf: Any) -> Any:
        return copy.deepcopy(leaf) if isinstance(leaf, CACHES) else by_identity.get(id(leaf), leaf)

    return tree_map(own, arguments), fresh


def contents_written(containers: list[UserDict[Any, Any]], contents: Contents) -> Contents:
    """What a call put into the containers that were closed over `contents`."""
    return [
        {name: value for name, value in container.items() if value is not before.get(name)}
        for container, before in zip(containers, contents, strict=True)
    ]


def call_with_containers(run: Callable[[Any, Any], Any], arguments: Any, contents: Contents) -> tuple[Any, Contents]:
    """What `run(args, kwargs)` returns, with containers closed over `contents`, and what it put into them."""
    (args, kwargs), containers = with_own_containers(arguments, contents)
    returned = run(args, kwargs)
    return returned, contents_written(containers, contents)


def fill_containers(arguments: Any, outputs: tuple[Any, Contents]) -> Any:
    """What a call returned; what it put into containers goes into those of `arguments`."""
    returned, side_outputs = outputs
    for container, found in zip(containers_of(arguments), side_outputs, strict=True):
        container.update(found)
    return returned
