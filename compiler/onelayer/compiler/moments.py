"""Second moments of what linears read or write, never wider than the narrow side of the linear.

A linear with out < in is served by the moment of its output, C = Y^T Y (out x out); one with out >= in by that of its
input, G = X^T X (in x in), which every linear reading the same tensor shares (q/k/v, gate/up). Shape letters: N rows
(tokens), F features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# More rows than this share with an infinite or NaN entry mean a broken model or broken data, not an outlier.
NON_FINITE_LIMIT = 0.1


class Gram:
    """X^T X (F x F) over many batches of rows: products in `product_dtype`, totals in float64.

    Rows with a non-finite entry are left out and counted.
    """

    def __init__(self, features: int, device: torch.device, product_dtype: torch.dtype = torch.float64) -> None:
        self.total_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped_rows = 0
        self.product_dtype = product_dtype

    def add(self, x: torch.Tensor) -> None:
        """Add the rows of `x` (..., F)."""
        x_NF = x.reshape(-1, x.shape[-1]).to(self.product_dtype)
        product_FF = x_NF.T @ x_NF
        self.rows += len(x_NF)
        # One non-finite entry anywhere makes the trace non-finite; only then is it worth looking row by row.
        if not torch.isfinite(product_FF.diagonal().sum()):
            keep_N = torch.isfinite(x_NF).all(dim=-1)
            self.dropped_rows += int((~keep_N).sum())
            x_NF = x_NF[keep_N]
            product_FF = x_NF.T @ x_NF
        self.total_FF += product_FF


@dataclass
class Moments:
    """What calibration says about one linear: a Gram of its input or of its output, and the input's energy by feature.

    `input_energy` (in,) is the diagonal of X^T X; with an output moment it prices the rounding of `down`.
    """

    gram: Gram
    of_input: bool
    input_energy: torch.Tensor | None = None


@dataclass
class _Site:
    """One input tensor that several linears read: the Gram they share and who brought it."""

    gram: Gram
    owner: str
    current: torch.Tensor | None = None
    current_version: int = -1
    owner_came: bool = False

    def is_current(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor that was added last, unchanged since."""
        return self.current is x and self.current_version == x._version


@dataclass
class MomentHooks:
    """Gathers the moments of the linears of one unit while the unit runs for its batches.

    `linears` by name. A linear that is never called gets no moments: its weight, if used, is used behind its back.
    """

    linears: dict[str, nn.Module]
    device: torch.device
    product_dtype: torch.dtype = torch.float64
    moments: dict[str, Moments] = field(default_factory=dict)
    _sites: dict[str, _Site] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on; off again on exit."""
        handles = []
        try:
            for name, linear in self.linears.items():
                handles.append(linear.register_forward_hook(self._hook(name, linear), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def next_batch(self) -> None:
        """Forget the tensors of the batch before."""
        for site in self._sites.values():
            site.current, site.owner_came = None, False

    def _hook(self, name: str, linear: nn.Module) -> Any:
        out_features, in_features = weight_shape(linear)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if name not in self.moments:
                self._settle(name, x, out_features, in_features)
            moments = self.moments[name]
            if moments.of_input:
                self._add_input(name, x)
                return
            assert moments.input_energy is not None
            moments.gram.add(output if module.bias is None else output - module.bias)
            energy = x.reshape(-1, in_features).to(torch.float32).square().sum(dim=0, dtype=torch.float64)
            moments.input_energy += torch.nan_to_num(energy, nan=0.0, posinf=0.0)

        return hook

    def _settle(self, name: str, x: torch.Tensor, out_features: int, in_features: int) -> None:
        """Choose, at the first call, the moment that costs least and is never wider than min(in, out)."""
        shared = next((site for site in self._sites.values() if site.is_current(x)), None)
        if shared is not None:
            self._sites[name] = shared
        elif out_features >= in_features:
            self._sites[name] = _Site(self._gram(in_features), name)
        if name in self._sites:
            self.moments[name] = Moments(self._sites[name].gram, of_input=True)
        else:
            energy = torch.zeros(in_features, dtype=torch.float64, device=self.device)
            self.moments[name] = Moments(self._gram(out_features), of_input=False, input_energy=energy)

    def _gram(self, features: int) -> Gram:
        return Gram(features, self.device, self.product_dtype)

    def _add_input(self, name: str, x: torch.Tensor) -> None:
        site = self._sites[name]
        site.owner_came |= name == site.owner
        if site.is_current(x):
            return
        if name != site.owner and site.owner_came:
            raise RuntimeError(f"{name} reads another tensor than {site.owner}, with which it shared its input before")
        site.gram.add(x)
        site.current, site.current_version = x, x._version


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of its input with a 2-D weight: `nn.Linear`, or GPT-2's `Conv1D`.

    A subclass with a forward of its own is none: it may return more, or use its weight in another way.
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear; `Conv1D` stores its weight transposed."""
    assert isinstance(linear.weight, torch.Tensor)
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
