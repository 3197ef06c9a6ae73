"""One call of a part of a streamed model, as one operation of autograd: streamed forward, and back for its gradients.

In: the arguments of the call, for all rows. Out: the part's own results for all rows. The call runs in micro-batches
through one unit after another, as `GradientStream` does it; gradients of trained parameters go to their `.grad`, those
of the arguments to the code before.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.streaming.gradient_stream import HOST, GradientStream
from onelayer.runtime.streamed.rows import join_rows, split_rows

Tensors = tuple[torch.Tensor, ...]


class Region:
    """A call that is differentiated. `stream` is for this call alone; `running` surrounds all of its work."""

    def __init__(
        self,
        stream: GradientStream,
        running: Callable[[], AbstractContextManager[None]],
        arguments: Any,
        size: int | None,
        rows: int | None,
    ) -> None:
        self.stream = stream
        self.running = running
        self.inputs = [leaf for leaf in _unique_tensors(arguments) if leaf.requires_grad]
        with torch.enable_grad():  # micro-batches are parts of the leaves that collect the gradients of the arguments
            self._leaves = [tensor.detach().to(HOST).requires_grad_() for tensor in self.inputs]
            places = {id(tensor): leaf for tensor, leaf in zip(self.inputs, self._leaves, strict=True)}
            here = tree_map_only(torch.Tensor, lambda tensor: places.get(id(tensor), tensor.to(HOST)), arguments)
            self._pieces = [here] if rows is None or size is None else split_rows(here, rows, size)
            self._counts = [1] if rows is None or size is None else _counts(rows, size)
        self._results: list[Tensors] = []
        self._precision = _precision(stream.device)
        self._is_used = False

    def run(self, name: str) -> Any:
        """Return the results of the call, on the stream's device, in the graph of the arguments."""
        anchor = torch.empty(0, requires_grad=True)
        shape: list[Any] = []
        tensors = iter(_Streamed.apply(self, name, shape, anchor, *self.inputs))  # type: ignore[no-untyped-call]
        leaves, tree = shape
        return tree_unflatten([_with_tensor(leaf, tensors, self.device) for leaf in leaves], tree)

    @property
    def device(self) -> torch.device:
        """The device that the rest of the model computes on."""
        return self.stream.device

    def forward(self, name: str) -> tuple[list[torch.Tensor], list[Any], Any]:
        """Stream forward; return the differentiable results, and all leaves of the results with marks for those."""
        outputs: dict[int, Any] = {}
        self.stream.trained = len(self._pieces)
        self.stream.seed = _seed_of_generator()
        with self.running():
            self.stream.run([{"arguments": piece} for piece in self._pieces], outputs.__setitem__)
        if self.stream.is_random:  # the next call draws others, as after a call of the resident model
            torch.empty((), dtype=torch.int64).random_()
        self._pieces = []
        ordered = [outputs[index] for index in sorted(outputs)]
        self._results = [tuple(_differentiable(output)) for output in ordered]
        leaves, tree = tree_flatten(join_rows(ordered, self._counts, name))
        return [tensor.detach() for leaf in leaves for tensor in _differentiable(leaf)], leaves, tree

    def backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Stream back from the gradients of the results; return those of the arguments."""
        if self._is_used:
            raise RuntimeError("a streamed call keeps nothing after backward(); call the model again")
        self._is_used = True
        heads, slopes = [], []
        for pieces, gradient in zip(zip(*self._results, strict=True), gradients, strict=True):
            if gradient is not None:
                parts = [gradient] if len(pieces) == 1 else gradient.split([len(piece) for piece in pieces])
                wanted = [(piece, part) for piece, part in zip(pieces, parts, strict=True) if piece.requires_grad]
                heads += [piece for piece, _ in wanted]
                slopes += [part.to(HOST) for _, part in wanted]
        with self.running(), torch.enable_grad():
            if heads:
                # Micro-batches share the graph of what they share, and units have parts of it still to be walked.
                torch.autograd.backward(heads, slopes, retain_graph=True)
            self._results = []
            with ExitStack() as stack:
                for context in self._precision:
                    stack.enter_context(context())
                self.stream.reverse()
        return [
            None if leaf.grad is None else leaf.grad.to(tensor.device)
            for leaf, tensor in zip(self._leaves, self.inputs, strict=True)
        ]


class _Streamed(torch.autograd.Function):
    """A region as an operation. `anchor` requires a gradient, so that the results do where no argument does."""

    @staticmethod
    def forward(ctx: Any, region: Region, name: str, shape: list[Any], *tensors: torch.Tensor) -> Tensors:
        ctx.region = region
        ctx.set_materialize_grads(False)
        results, leaves, tree = region.forward(name)
        shape += [leaves, tree]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, None, *ctx.region.backward(gradients)


def _differentiable(output: Any) -> list[torch.Tensor]:
    """List the tensors that stand for the differentiable leaves of a result; hidden states for deferred logits."""
    leaves = (leaf.hidden if isinstance(leaf, DeferredLogits) else leaf for leaf in tree_leaves(output))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _with_tensor(leaf: Any, tensors: Iterator[torch.Tensor], device: torch.device) -> Any:
    """Return a leaf of a result on `device`, with the next of `tensors` in its place if it is differentiable."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    tensor = next(tensors).to(device) if leaf.is_floating_point() else leaf.to(device)
    return leaf.over_other(tensor) if isinstance(leaf, DeferredLogits) else tensor


def _unique_tensors(arguments: Any) -> list[torch.Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}.values())


def _counts(rows: int, size: int) -> list[int]:
    return [min(size, rows - start) for start in range(0, rows, size)]


def _seed_of_generator() -> int:
    """Return a seed that follows from the state of torch's generator, without drawing from it."""
    return int.from_bytes(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()[:7])


def _precision(device: torch.device) -> list[Callable[[], AbstractContextManager[Any]]]:
    """Return what puts autocast back as it is now: the way back runs outside of the caller's `with` block."""

    def context(kind: str) -> Callable[[], AbstractContextManager[Any]]:
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # A cached cast belongs to the graph of one micro-batch, and would be walked by the next.
        return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)

    return [context(kind) for kind in sorted({device.type, HOST.type})]
