"""How far a unit with trained factors is from the original: in its outputs, and in the gradients that flow back. Pure.

The gradient at the unit's outputs is the original's in both. So the gradients at every linear's output and at the
unit's inputs are functions of the factors, whose derivative is taken by running backward twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.moments import row_count
from onelayer.compiler.machine.transfers import Transfers
from onelayer.compiler.models.units import Unit, replaced_forwards
from onelayer.compiler.refine.calls import Call
from onelayer.compiler.refine.trained_experts import Trained
from onelayer.compiler.streaming.unit_boundary import rerun


@dataclass(frozen=True)
class Distances:
    """Distances of a resident unit with trained `linears` from the original.

    Modules of experts may be among them. The keys are the modules' paths below the unit.
    """

    unit: Unit
    linears: Mapping[str, Trained]
    transfers: Transfers

    @property
    def device(self) -> torch.device:
        """The device that the unit computes on."""
        return self.transfers.device

    def of_outputs(self, call: Call, *, guarded: bool = False) -> tuple[torch.Tensor, int]:
        """Sum the outputs' squared distances, relative to each output's size; return also their number.

        An output without finite rows is not counted. `guarded`: keep rows that are not finite out of gradients.
        """
        with (
            replaced_linears(self.unit, self.linears),
            _guarded(self.unit, self.linears if guarded and call.dropped_rows else ()),
        ):
            outputs, _ = rerun(self.unit, call.kept, self.transfers, asked=call.asked)
        return self._between(call, outputs)

    def of_both(self, call: Call) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return the distance of outputs, their number, and the mean squared distance of gradients, relative to each.

        Without known gradients the last is zero. Raises `InputError` if the unit cannot be differentiated twice.
        """
        if not call.gradients:
            distance, outputs = self.of_outputs(call, guarded=True)
            return distance, outputs, torch.zeros((), device=self.device)
        _, exact = self._gradients(call, create_graph=False)
        with (
            replaced_linears(self.unit, self.linears, twice=True),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the only one with a second derivative
            found_outputs, found = self._gradients(call, create_graph=torch.is_grad_enabled())
        distance, outputs = self._between(call, found_outputs)
        pairs = zip(found, exact, strict=True)
        parts = [_relative(one, other) for one, other in pairs if one is not None and other is not None]
        return distance, outputs, torch.stack(parts).mean() if parts else torch.zeros((), device=self.device)

    def _between(self, call: Call, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
        total, counted = torch.zeros((), device=self.device), 0
        targets, masks = self.transfers.upload((call.targets, call.finite))
        for found, exact, finite in zip(outputs, targets, masks, strict=True):
            if finite is not None:
                found, exact = (values.reshape(row_count(values), -1)[finite] for values in (found, exact))
            if exact.numel() or finite is None:
                total, counted = total + _relative(found, exact), counted + 1
        return total, counted

    def _gradients(self, call: Call, *, create_graph: bool) -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
        """Run the unit; return its outputs, and gradients at its inputs and at the outputs of its linears."""
        read = list[torch.Tensor]()

        def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            read.append(output if output.requires_grad else output.requires_grad_())

        with ExitStack() as handles, torch.enable_grad():
            for path in self.linears:
                handles.enter_context(self.unit.module.get_submodule(path).register_forward_hook(after))
            outputs, leaves = rerun(self.unit, call.kept, self.transfers, asked=call.asked)
            points = [*(leaf for leaf in leaves if leaf.requires_grad), *read]
            pairs = [
                (output, _unit_size(gradient).to(output.dtype))
                for output, gradient in zip(outputs, self.transfers.upload(call.gradients), strict=True)
                if gradient is not None and output.requires_grad
            ]
            if not pairs:
                return outputs, [None] * len(points)
            ends, begun = map(list, zip(*pairs, strict=True))
            found = torch.autograd.grad(ends, points, begun, create_graph=create_graph, allow_unused=True)
        return outputs, found


@contextmanager
def replaced_linears(unit: Unit, linears: Mapping[str, Trained], *, twice: bool = False) -> Iterator[None]:
    """Let a unit compute with `linears`, by path below it, instead of its weights; restore the weights on exit."""
    modules: dict[str, Any] = {path: unit.module.get_submodule(path) for path in linears}
    forwards: dict[nn.Module, Callable[..., Any]] = {
        module: linears[path].forward_of(module, twice=twice) for path, module in modules.items()
    }
    with replaced_forwards(unit, forwards):
        yield


def twice_differentiable(unit: Unit, error: RuntimeError) -> InputError | None:
    """Return what to raise if a unit's code has no second derivative; None if the error says something else."""
    if "derivative" in str(error) or "differentiate twice" in str(error):
        return InputError(f"--backward: {unit.name} cannot be differentiated twice ({error}); leave --backward out")
    return None


def _relative(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Compute ||found - exact||^2 / ||exact||^2, in float32 or wider."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found, exact = found.to(wide), exact.detach().to(wide)
    lost, energy = (found - exact).abs().square().mean(), exact.abs().square().mean()
    return lost / energy.clamp_min(torch.finfo(torch.float32).tiny)


def _unit_size(gradient: torch.Tensor) -> torch.Tensor:
    """Scale to a root mean square of one: gradients of a mean over many tokens are tiny, and their squares vanish."""
    wide = gradient.float()
    return wide / wide.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


@contextmanager
def _guarded(unit: Unit, paths: Iterable[str]) -> Iterator[None]:
    """Replace rows and gradients that are not finite by zeros in the linears at `paths`.

    A product's gradient sums over rows. One row that is not finite would spoil it, even if its output does not count.
    """

    def finite(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isfinite(rows).all(dim=-1, keepdim=True), rows, 0)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (finite(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: finite(kwargs[name])}

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(finite)

    with ExitStack() as handles:
        for path in paths:
            module = unit.module.get_submodule(path)
            handles.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.enter_context(module.register_forward_hook(after))
        yield
