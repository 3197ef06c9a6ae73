"""Second moments of what linears read or write, never wider than the narrow side of the linear.

A linear with out < in is served by the moment of its output, C = Y^T Y (out x out); one with out >= in by that of its
input, G = X^T X (in x in), which every linear reading the same tensor shares (q/k/v, gate/up). Shape letters: N rows
(tokens), F features.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# More rows than this share with an infinite or NaN entry mean a broken model or broken data, not an outlier.
NON_FINITE_LIMIT = 0.1
# By this many rows a subclass of a linear is told from a linear.
CHECKED_ROWS = 16


def row_count(x: torch.Tensor) -> int:
    """How many rows `x` (..., F) has; a bare number is one."""
    return x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 1


def finite_rows(x: torch.Tensor) -> torch.Tensor | None:
    """Which rows of (..., F) hold nothing but finite numbers, (N,); None where all do."""
    # One non-finite entry anywhere makes the sum non-finite; only then is it worth looking row by row.
    if torch.isfinite(x.sum()):
        return None
    keep_N = torch.isfinite(x.reshape(row_count(x), -1)).all(dim=-1)
    return None if keep_N.all() else keep_N


def check_rows(name: str, dropped_rows: int, rows: int) -> None:
    """Raise `RuntimeError` where more of the calibration's rows are not finite than an outlier explains."""
    if dropped_rows > NON_FINITE_LIMIT * rows:
        raise RuntimeError(
            f"{name}: {dropped_rows} of {rows} calibration rows are not finite, more than {NON_FINITE_LIMIT:.0%}; "
            "check the checkpoint's dtype and the data"
        )


class Gram:
    """X^T X (F x F) over many batches of rows: products in `product_dtype`, totals in float64.

    Rows with a non-finite entry are left out and counted.
    """

    def __init__(self, features: int, device: torch.device, product_dtype: torch.dtype = torch.float64) -> None:
        self.total_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0
        self.dropped_rows = 0
        self.product_dtype = product_dtype

    def add(self, x: torch.Tensor) -> torch.Tensor | None:
        """Add the rows of `x` (..., F); returns which were taken, (N,), or None where all were."""
        x_NF = x.reshape(-1, x.shape[-1]).to(self.product_dtype)
        product_FF = x_NF.T @ x_NF
        self.rows += len(x_NF)
        keep_N = None
        # One non-finite entry anywhere makes the trace non-finite; only then is it worth looking row by row.
        if not torch.isfinite(product_FF.diagonal().sum()):
            keep_N = torch.isfinite(x_NF).all(dim=-1)
            self.dropped_rows += int((~keep_N).sum())
            x_NF = x_NF[keep_N]
            product_FF = x_NF.T @ x_NF
        self.total_FF += product_FF
        return keep_N

    def without(self, part: "Gram") -> "Gram":
        """This Gram as it was before the rows of `part` were added."""
        rest = copy.copy(self)
        rest.total_FF = self.total_FF - part.total_FF
        rest.rows, rest.dropped_rows = self.rows - part.rows, self.dropped_rows - part.dropped_rows
        return rest


@dataclass
class Moments:
    """What calibration says about one linear: a Gram of its input or of its output, and the input's energy by feature.

    `input_energy` (in,) is the diagonal of X^T X; with an output moment it prices the rounding of `down`.
    """

    gram: Gram
    of_input: bool
    input_energy: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, int], of_input: bool, device: torch.device, product_dtype: torch.dtype
    ) -> "Moments":
        """Of a linear (out, in) that has read nothing yet."""
        out_features, in_features = shape
        gram = Gram(in_features if of_input else out_features, device, product_dtype)
        return cls(gram, of_input, None if of_input else torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Add what was read, (..., in), and what came of it without bias, (..., out), which an input moment ignores.

        A row that one of the two leaves out, both do.
        """
        if self.of_input:
            self.gram.add(x)
            return
        assert y is not None
        assert self.input_energy is not None
        keep_N = self.gram.add(y)
        x_NF = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.input_energy += (x_NF if keep_N is None else x_NF[keep_N]).square().sum(dim=0, dtype=torch.float64)


@dataclass
class _Site:
    """One input tensor that several linears read: the Gram they share, and who of them has read the tensor at hand."""

    gram: Gram
    members: set[str]
    tensors: int = 0
    current: torch.Tensor | None = None
    current_version: int = -1
    readers: set[str] = field(default_factory=set)

    def is_current(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor that was added last, unchanged since."""
        return self.current is x and self.current_version == x._version

    def read(self, name: str, x: torch.Tensor) -> None:
        """A member reads `x`, which is added once for all."""
        if not self.is_current(x) or name in self.readers:
            self.gram.add(x)
            self.tensors += 1
            self.current, self.current_version, self.readers = x, x._version, set()
        self.readers.add(name)


@dataclass
class MomentHooks:
    """Gathers the moments of the linears of one unit while the unit runs for its batches.

    `linears` by name. One that is never called, or does another thing than a linear, gets none: `reason` says so.
    """

    linears: dict[str, nn.Module]
    device: torch.device
    product_dtype: torch.dtype = torch.float64
    moments: dict[str, Moments] = field(default_factory=dict)
    _sites: dict[str, _Site] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on; off again on exit."""
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
        """The batch before is through: part those that did not read what they shared, and forget its tensors."""
        for site in list(self._sites.values()):
            self._part_absent(site)
            site.current, site.readers = None, set()

    def reason(self, name: str) -> str:
        """Why a linear has no moments."""
        if name in self._refused:
            return "its forward is not that of a linear"
        return "never called; its weight may be used in another way"

    def _hook(self, name: str, linear: nn.Module) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if name in self._refused:
                return
            if name not in self.moments:
                if not acts_as_linear(linear, x, output):
                    self._refused.add(name)
                    return
                self._settle(name, x)
            shared = self._sites.get(name)
            if shared is not None and not shared.is_current(x):
                self._part_absent(shared)
            # Parted or not, this linear's own place now is where its input belongs.
            if name in self._sites:
                self._sites[name].read(name, x)
                return
            self.moments[name].add(x, output if module.bias is None else output - module.bias)

        return hook

    def _settle(self, name: str, x: torch.Tensor) -> None:
        """Choose, at the first call, the moment that costs least and is never wider than min(in, out).

        A site that has seen more than the tensor at hand has seen what this linear did not read.
        """
        out_features, in_features = weight_shape(self.linears[name])
        sites = self._sites.values()
        shared = next((site for site in sites if site.is_current(x) and site.tensors == 1), None)
        if shared is not None:
            shared.members.add(name)
            self._place(name, shared)
        elif out_features >= in_features:
            self._place(name, _Site(Gram(in_features, self.device, self.product_dtype), {name}))
        else:
            shape = (out_features, in_features)
            self.moments[name] = Moments.empty(shape, False, self.device, self.product_dtype)

    def _place(self, name: str, site: _Site) -> None:
        self._sites[name], self.moments[name] = site, Moments(site.gram, of_input=True)

    def _part_absent(self, site: _Site) -> None:
        """Sharing ends for members that have not read the site's last tensor: each goes on from what it did read."""
        if site.current is None or site.readers == site.members:
            return
        if not site.is_current(site.current):
            raise RuntimeError(f"{min(site.members)}: its input was changed in place between linears that share it")
        last = Gram(len(site.gram.total_FF), self.device, self.product_dtype)
        last.add(site.current)
        for name in site.members - site.readers:
            gram = site.gram.without(last)
            out_features, in_features = weight_shape(self.linears[name])
            if out_features >= in_features:
                self._place(name, _Site(gram, {name}, site.tensors - 1))
            else:
                del self._sites[name]
                self.moments[name] = of_output(gram, self.linears[name])
        site.members = set(site.readers)


def of_output(gram: Gram, linear: nn.Module) -> Moments:
    """The moment of a linear's outputs, bias left out, from that of its inputs: W G W^T."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    weight_OI = (weight.T if isinstance(linear, Conv1D) else weight).to(gram.total_FF)
    outputs = copy.copy(gram)
    outputs.total_FF = weight_OI @ gram.total_FF @ weight_OI.T
    return Moments(outputs, of_input=False, input_energy=gram.total_FF.diagonal().clone())


def is_linear(module: nn.Module) -> bool:
    """Whether a module has the weight of a linear: `nn.Linear`, or GPT-2's `Conv1D`, or a subclass of theirs."""
    return isinstance(module, nn.Linear | Conv1D)


def acts_as_linear(linear: nn.Module, x: torch.Tensor, output: Any) -> bool:
    """Whether a call did what a linear does; a subclass may return more than that, or use its weight in another way."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    out_features, in_features = weight_shape(linear)
    if not isinstance(output, torch.Tensor) or output.shape != (*x.shape[:-1], out_features):
        return False
    x_NI, y_NO = x.reshape(-1, in_features), output.reshape(-1, out_features)
    finite = torch.isfinite(x_NI).all(dim=-1) & torch.isfinite(y_NO).all(dim=-1)
    x_NI, y_NO = x_NI[finite][:CHECKED_ROWS], y_NO[finite][:CHECKED_ROWS]
    assert isinstance(linear.weight, torch.Tensor)
    weight_OI = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    wanted_NO = nn.functional.linear(x_NI, weight_OI, linear.bias if isinstance(linear.bias, torch.Tensor) else None)
    tolerance = 1e-3 + 2 * torch.finfo(wanted_NO.dtype).eps
    return bool((y_NO.float() - wanted_NO.float()).norm() <= tolerance * wanted_NO.float().norm())


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear; `Conv1D` stores its weight transposed."""
    assert isinstance(linear.weight, torch.Tensor)
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
