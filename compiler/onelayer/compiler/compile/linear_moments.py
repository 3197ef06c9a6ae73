"""Hooks that gather the moments of linears while their unit runs."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.codes.forms import OUTPUT_BLOCK
from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.moments import Gram, Moments, OutputWeights
from onelayer.compiler.factors.sum_grid import SumGrid
from onelayer.compiler.models.linears import weight_of, weight_shape

# The number of rows on which a subclass of a linear is compared with a linear.
CHECKED_ROWS = 16


@dataclass
class _Site:
    """One input tensor that several linears read: their shared Gram, and which of them have read the present tensor."""

    gram: Gram | BlockGram
    members: set[str]
    tensors: int = 0
    current: torch.Tensor | None = None
    current_version: int = -1
    readers: set[str] = field(default_factory=set)

    def is_current(self, x: torch.Tensor) -> bool:
        """Whether `x` is the tensor that was added last, unchanged since."""
        return self.current is x and self.current_version == x._version

    def read(self, name: str, x: torch.Tensor) -> None:
        """Note that a member reads `x`, which is added once for all members."""
        if not self.is_current(x) or name in self.readers:
            self.gram.add(x)
            self.tensors += 1
            self.current, self.current_version, self.readers = x, x._version, set()
        self.readers.add(name)


@dataclass
class MomentHooks:
    """Gathers the moments of the linears of one unit while the unit runs for its batches.

    `linears` by name. A linear that is never called, or does not behave like one, gets none: see `reason`. With
    `sides`, `inputs` are gathered in blocks instead of `moments`. Where the loss's gradients come back, `outputs` are
    the moments of those at a linear's outputs, in blocks. `batches` is how many there are in all processes; `waits`
    means that another process has the first of them, and `settle` is called after the first one here.
    """

    linears: dict[str, nn.Module]
    device: torch.device
    product_dtype: torch.dtype = torch.float64
    sides: bool = False
    batches: int = 1
    waits: bool = False
    moments: dict[str, Moments] = field(default_factory=dict)
    outputs: dict[str, BlockGram] = field(default_factory=dict)
    _sites: dict[str, _Site] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Register the hooks; remove them on exit."""
        handles = []
        try:
            for name, linear in self.linears.items():
                handles.append(linear.register_forward_hook(self._hook(name, linear), with_kwargs=True))
            yield
            self.next_batch()
        finally:
            for handle in handles:
                handle.remove()

    def next_batch(self) -> None:
        """End the previous batch: part linears that did not read a shared tensor, and forget its tensors."""
        for site in list(self._sites.values()):
            self._part_absent(site)
            site.current, site.readers = None, set()

    @property
    def inputs(self) -> dict[str, BlockGram]:
        """The moments of the inputs of each linear that was called; several linears may share one."""
        return {name: site.gram for name, site in self._sites.items() if isinstance(site.gram, BlockGram)}

    def take_inputs(self, inputs: Mapping[str, BlockGram]) -> None:
        """Take moments of inputs that processes have added up in place of this one's."""
        self._sites = {name: _Site(gram, {name}) for name, gram in inputs.items()}

    def output_weights(self, name: str, expected: Expectations) -> OutputWeights | None:
        """Return what the outputs of a linear count; None if no gradient came back to it."""
        outputs = self.outputs.get(name)
        return None if outputs is None else OutputWeights.of(outputs.blocks, outputs.features, expected)

    def reason(self, name: str) -> str:
        """Return why a linear has no moments."""
        if name in self.refused:
            return "its forward is not that of a linear"
        return "never called; its weight may be used in another way"

    def _hook(self, name: str, linear: nn.Module) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            with torch.no_grad():
                self._read(name, linear, args[0] if args else next(iter(kwargs.values())), output)
            if torch.is_grad_enabled() and (name in self.moments or name in self._sites):
                self._await_gradient(name, output)

        return hook

    def _read(self, name: str, linear: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        """Take the input of one call, or its output if that is the narrow side."""
        if name in self.refused:
            return
        if name not in self.moments and name not in self._sites:
            if not acts_as_linear(linear, x, output):
                self.refused.add(name)
                return
            self._settle(name, x)
        shared = self._sites.get(name)
        if shared is not None and not shared.is_current(x):
            self._part_absent(shared)
        # The linear may have been parted just now; its present site is the one that its input belongs to.
        if name in self._sites:
            self._sites[name].read(name, x)
            return
        bias = linear.bias
        self.moments[name].add(x, output - bias if isinstance(bias, torch.Tensor) else output)

    def _await_gradient(self, name: str, output: torch.Tensor) -> None:
        """Add the gradient at an output when it comes back; outputs in the first unit begin the graph."""
        if name not in self.outputs:
            self.outputs[name] = BlockGram(output.shape[-1], self.device, OUTPUT_BLOCK)
        output.requires_grad_().register_hook(self.outputs[name].add)

    def _settle(self, name: str, x: torch.Tensor) -> None:
        """Choose at the first call the cheapest moment, which is never wider than min(in, out).

        A site that has seen more than the present tensor contains tensors that this linear did not read.
        """
        out_features, in_features = weight_shape(self.linears[name])
        sites = self._sites.values()
        shared = next((site for site in sites if site.is_current(x) and site.tensors == 1), None)
        if shared is not None:
            shared.members.add(name)
            self._place(name, shared)
        elif self.sides:
            self._place(name, _Site(BlockGram(in_features, self.device), {name}))
        elif out_features >= in_features:
            self._place(name, _Site(Gram(in_features, self.device, self.product_dtype, self._grid()), {name}))
        else:
            shape = (out_features, in_features)
            self.moments[name] = Moments.empty(shape, False, self.device, self.product_dtype, self._grid)

    def _grid(self) -> SumGrid:
        return SumGrid(self.batches, self.waits)

    def _place(self, name: str, site: _Site) -> None:
        self._sites[name] = site
        if isinstance(site.gram, Gram):
            self.moments[name] = Moments(site.gram, of_input=True)

    def _part_absent(self, site: _Site) -> None:
        """End the sharing for members that have not read the site's last tensor; each continues from what it read."""
        if site.current is None or site.readers == site.members:
            return
        if not site.is_current(site.current):
            raise RuntimeError(f"{min(site.members)}: its input was changed in place between linears that share it")
        for name in site.members - site.readers:
            gram = site.gram.without(site.current)
            out_features, in_features = weight_shape(self.linears[name])
            if isinstance(gram, BlockGram) or out_features >= in_features:
                self._place(name, _Site(gram, {name}, site.tensors - 1))
            else:
                del self._sites[name]
                self.moments[name] = of_output(gram, self.linears[name])
        site.members = set(site.readers)


def of_output(gram: Gram, linear: nn.Module) -> Moments:
    """Return the moment of a linear's outputs without bias, from that of its inputs: W G W^T."""
    weight_OI = weight_of(linear).to(gram.total_FF)
    outputs = copy.copy(gram)
    outputs.grid = SumGrid()
    outputs.total_FF = weight_OI @ gram.total_FF @ weight_OI.T
    return Moments(outputs, of_input=False, input_energy=gram.total_FF.diagonal().clone())


def acts_as_linear(linear: nn.Module, x: torch.Tensor, output: Any) -> bool:
    """Whether a call computed what a linear does; a subclass may return more, or use its weight in another way."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    out_features, in_features = weight_shape(linear)
    if not isinstance(output, torch.Tensor) or output.shape != (*x.shape[:-1], out_features):
        return False
    x_NI, y_NO = x.reshape(-1, in_features), output.reshape(-1, out_features)
    finite = torch.isfinite(x_NI).all(dim=-1) & torch.isfinite(y_NO).all(dim=-1)
    x_NI, y_NO = x_NI[finite][:CHECKED_ROWS], y_NO[finite][:CHECKED_ROWS]
    wanted_NO = nn.functional.linear(
        x_NI, weight_of(linear), linear.bias if isinstance(linear.bias, torch.Tensor) else None
    )
    tolerance = 1e-3 + 2 * torch.finfo(wanted_NO.dtype).eps
    return bool((y_NO.float() - wanted_NO.float()).norm() <= tolerance * wanted_NO.float().norm())
