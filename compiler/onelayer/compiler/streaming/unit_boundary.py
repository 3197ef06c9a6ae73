"""The boundary of a unit in a graph of gradients: its inputs and outputs, without its inside.

The code before a unit and after it builds graphs of its own. A unit's inputs are kept as plain values, each with the
edge of the earlier graph that its gradient belongs to. Its outputs begin the later graph, and their gradients are
caught there. The inside exists only while the unit runs again.
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

from onelayer.compiler.factors.activation_factors import ActivationFactors, Compressed, ExactTensor
from onelayer.compiler.machine.transfers import Transfers
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.recorded_outputs import Recorded, recording

Slots = list[torch.Tensor | None]
Hold = Callable[[torch.Tensor], None]


def differentiable(values: Any) -> list[torch.Tensor]:
    """List the tensors of a tree that can have gradients, each once, in the order of the tree.

    Deferred logits are represented by their hidden states.
    """
    leaves = (leaf.hidden if isinstance(leaf, DeferredLogits) else leaf for leaf in tree_leaves(values))
    tensors = {
        id(tensor): tensor
        for tensor in leaves
        if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())
    }
    return list(tensors.values())


def _replaced(values: Any, others: dict[int, torch.Tensor]) -> Any:
    """Replace some differentiable tensors of a tree, by identity."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DeferredLogits):
            return tensor.over_other(others.get(id(tensor.hidden), tensor.hidden))
        return others.get(id(tensor), tensor)

    return tree_map_only(torch.Tensor, other, values)


class _Seam(torch.autograd.Function):
    """Takes values without history and returns them as the beginning of a graph; gradients end in `slots`, held."""

    @staticmethod
    def forward(
        ctx: Any, slots: Slots, hold: Hold, anchor: torch.Tensor, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.slots, ctx.hold = slots, hold
        ctx.set_materialize_grads(False)
        # To autograd `.data` is not a view, so the model's code may change it in place like any other output.
        return tuple(value.data for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                before = ctx.slots[place]
                ctx.slots[place] = gradient.detach() if before is None else before + gradient
                ctx.hold(ctx.slots[place])
        return (None,) * (len(gradients) + 3)


def cut_graph(outputs: Any, hold: Hold) -> tuple[Any, Slots]:
    """Return the outputs of a unit as the beginning of a graph, and the slots that catch their gradients.

    `hold` is called with each gradient while it waits.
    """
    tensors = differentiable(outputs)
    slots: Slots = [None] * len(tensors)
    if not tensors:
        return outputs, slots
    with torch.enable_grad():
        begun = _Seam.apply(slots, hold, torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
    return _replaced(outputs, dict(zip(map(id, tensors), begun, strict=True))), slots


# Makes the compressed form that is kept instead of a tensor.
Shrink = Callable[[torch.Tensor], Compressed]


@dataclass
class UnitInputs:
    """The arguments of one call of a unit without their history, and the edges that their gradients go to.

    `arguments` is a tree that holds compressed forms of some tensors. `edges[i]` belongs to the i-th differentiable
    tensor; it is None if nothing before the tensor needs a gradient.
    """

    arguments: Any
    edges: list[GradientEdge | None]
    versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Any, known: WeakTensorKeyDictionary, shrink: Shrink | None = None) -> "UnitInputs":
        """Keep `arguments`. `known` maps earlier tensors to what is kept of them, so that shared tensors stay shared.

        `shrink` compresses the tensors that need a gradient.
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
        """Whether anything before the unit needs a gradient."""
        return any(edge is not None for edge in self.edges)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All kept tensors, including those of compressed forms."""
        tensors: list[torch.Tensor] = []
        for leaf in tree_leaves(self.arguments):
            if isinstance(leaf, ActivationFactors | ExactTensor):
                tensors += leaf.tensors
            elif isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
        return tensors

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if an input was changed in place after the unit had read it."""
        if self.versions != _versions(tree_leaves(self.arguments)):
            raise RuntimeError("an input was changed in place after the unit had read it, so it cannot be run again")

    def rebuild(self, transfers: Transfers) -> tuple[Any, list[torch.Tensor]]:
        """Return the arguments on the device for another run, and the leaves whose gradients `send_gradients` takes."""
        rebuilt: dict[int, torch.Tensor] = {}

        def decompressed(leaf: Any) -> Any:
            if isinstance(leaf, ActivationFactors | ExactTensor):
                if id(leaf) not in rebuilt:
                    rebuilt[id(leaf)] = leaf.rebuild()
                return rebuilt[id(leaf)]
            return leaf

        arguments = tree_map(decompressed, self.arguments)
        originals = differentiable(arguments)
        leaves = [
            tensor.detach().requires_grad_(edge is not None)
            for tensor, edge in zip(transfers.upload(originals), self.edges, strict=True)
        ]
        arguments = _replaced(arguments, dict(zip(map(id, originals), leaves, strict=True)))
        return transfers.upload(arguments), leaves

    def send_gradients(self, leaves: list[torch.Tensor], transfers: Transfers) -> None:
        """Send the gradients of the leaves through the graph before the unit, into the slots of earlier units."""
        pairs = [
            (edge, leaf.grad)
            for edge, leaf in zip(self.edges, leaves, strict=True)
            if edge is not None and leaf.grad is not None
        ]
        if pairs:
            edges, gradients = zip(*transfers.download(pairs), strict=True)
            # Several units may share a part of the graph, so it is retained; it is freed after the last of them.
            torch.autograd.backward(edges, gradients, retain_graph=True)


def rerun(
    unit: Unit,
    kept: UnitInputs,
    transfers: Transfers,
    forward: Callable[..., Any] | None = None,
    asked: Recorded | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a resident unit again, by `forward` if given; return its differentiable outputs and the leaves.

    `send_gradients` takes the leaves. `asked` is what it has to record inside.
    """
    (arguments, contents), leaves = kept.rebuild(transfers)
    run = forward or unit.forward
    with recording(asked) as recorded:
        outputs = call_with_containers(lambda args, kwargs: run(*args, **kwargs), arguments, contents)
    return differentiable((outputs, recorded)), leaves


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, torch.Tensor)]


CACHES = (Cache, EncoderDecoderCache)

Contents = list[dict[Any, Any]]


def containers_of(arguments: Any) -> list[UserDict[Any, Any]]:
    """List the containers among some arguments, each once. Plain dicts are trees to torch and are rebuilt anyway."""
    containers = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, UserDict)}
    return list(containers.values())


def with_contents(arguments: Any) -> tuple[Any, Contents]:
    """Return the arguments and the present contents of their containers."""
    return arguments, [dict(container) for container in containers_of(arguments)]


def with_own_containers(arguments: Any, contents: Contents) -> tuple[Any, list[UserDict[Any, Any]]]:
    """Return the arguments with fresh containers that hold `contents`, and those containers.

    A cache that some models create against their configuration is copied empty: otherwise a unit that runs twice would
    find its own keys and values in it.
    """
    originals = containers_of(arguments)
    fresh = [type(container)(content) for container, content in zip(originals, contents, strict=True)]
    by_identity: dict[int, Any] = dict(zip(map(id, originals), fresh, strict=True))

    def own(leaf: Any) -> Any:
        return copy.deepcopy(leaf) if isinstance(leaf, CACHES) else by_identity.get(id(leaf), leaf)

    return tree_map(own, arguments), fresh


def contents_written(containers: list[UserDict[Any, Any]], contents: Contents) -> Contents:
    """Return what a call added to containers that held `contents` before."""
    return [
        {name: value for name, value in container.items() if value is not before.get(name)}
        for container, before in zip(containers, contents, strict=True)
    ]


def call_with_containers(run: Callable[[Any, Any], Any], arguments: Any, contents: Contents) -> tuple[Any, Contents]:
    """Return the result of `run(args, kwargs)` with containers that hold `contents`, and what it added to them."""
    (args, kwargs), containers = with_own_containers(arguments, contents)
    returned = run(args, kwargs)
    return returned, contents_written(containers, contents)


def fill_containers(arguments: Any, outputs: tuple[Any, Contents]) -> Any:
    """Return a call's result, and put what it added to containers into those of `arguments`."""
    returned, side_outputs = outputs
    for container, added in zip(containers_of(arguments), side_outputs, strict=True):
        container.update(added)
    return returned
