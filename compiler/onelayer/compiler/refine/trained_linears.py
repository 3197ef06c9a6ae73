"""The trainable replacements of the linears of a unit: masters in float32, used as they will be stored."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from onelayer.compiler.codes.encode import Coded, decode_with
from onelayer.compiler.codes.product import coded_product
from onelayer.compiler.emulators.facts import CODEBOOK, CODES, DENSE, DOWN, UP
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.quantize import dequantize_matrix, quantize_matrix
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.transfers import upload


class TrainedLinear:
    """The trainable replacement of one linear's weight.

    `masters` are float32, by ending: up (k, out) and down (k, in), or the whole weight (out, in). Products use the
    masters as `round` last rounded them to their stored form, and gradients arrive at the rounded values.
    `hand_gradients` passes these gradients to the masters as if nothing had been rounded (straight-through estimator,
    arXiv 1308.3432).
    """

    def __init__(self, emulator: Emulator, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.factor_dtype, self.dtype = emulator.facts.quantized_dtype, dtype
        self.masters = {
            ending: upload(master.to(torch.float32).contiguous(), device)
            for ending, master in self.read(emulator, name).items()
        }
        self.rounded: dict[str, torch.Tensor] = {}
        self.round()

    def read(self, emulator: Emulator, name: str) -> dict[str, torch.Tensor]:
        """Read the masters from an emulator."""
        first, second = emulator.factors(name)
        return {DENSE: first} if second is None else {UP: first.T, DOWN: second}

    def round(self) -> None:
        """Round the present masters to the form in which they are stored."""
        for ending, master in self.masters.items():
            self.rounded[ending] = self.as_stored(ending, master).float().detach().requires_grad_()

    def as_stored(self, ending: str, master: torch.Tensor) -> torch.Tensor:
        """Round a master to what is stored of it."""
        factor_dtype, dtype = self.factor_dtype, self.dtype
        if factor_dtype is None:
            return master.to(dtype)
        return dequantize_matrix(quantize_matrix(master, factor_dtype), master.shape[1], factor_dtype, dtype)

    def hand_gradients(self) -> None:
        """Give the gradients of the rounded masters, gathered since the last `round`, to the masters."""
        for ending, master in self.masters.items():
            master.grad = self.rounded[ending].grad

    def forward_of(self, module: Any, *, twice: bool) -> Callable[..., torch.Tensor]:
        """Return the forward of a linear with this weight and its own bias; `twice`: it has a second derivative."""
        return partial(self.product, bias=module.bias, twice=twice)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, *, twice: bool = False) -> torch.Tensor:
        """Multiply as the emulator does, (N, in) -> (N, out); with `twice`, the product has a second derivative."""
        used = {ending: factor.to(x.dtype) for ending, factor in self.rounded.items()}
        y = x @ used[DENSE].T if DENSE in used else (x @ used[DOWN].T) @ used[UP]
        return y if bias is None else y + bias.to(y.dtype)

    def to_store(self) -> dict[str, torch.Tensor]:
        """Return what the host needs to store it, on the device."""
        if self.factor_dtype is not None:
            return {ending: quantize_matrix(master, self.factor_dtype) for ending, master in self.masters.items()}
        return {
            ending: (master.T if ending == UP else master).to(self.dtype).contiguous()
            for ending, master in self.masters.items()
        }

    def stored(self, arrived: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors as an emulator stores them, by ending, from what `to_store` gave, on the host."""
        return dict(arrived)


# The scales are stored in the rows of codes, but are trained by themselves.
SCALES = ".scales"


class TrainedCodes(TrainedLinear):
    """A coded weight: codebook (256, d), scales (out, groups) and residual factors are trained, the codes stay."""

    def read(self, emulator: Emulator, name: str) -> dict[str, torch.Tensor]:
        """Read the masters from an emulator."""
        coded, residual = emulator.coded(name)
        self.codes, self.bits, self.in_features = coded.codes, coded.bits, emulator.facts.shapes[name][1]
        masters = {CODEBOOK: coded.codebook, SCALES: coded.scales}
        return masters if residual is None else {**masters, UP: residual[0].T, DOWN: residual[1]}

    def as_stored(self, ending: str, master: torch.Tensor) -> torch.Tensor:
        """Round a master to what is stored of it."""
        if ending in (CODEBOOK, SCALES):
            return master.to(torch.bfloat16).to(self.dtype)
        return super().as_stored(ending, master)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, *, twice: bool = False) -> torch.Tensor:
        """Multiply as the emulator does, (N, in) -> (N, out); with `twice`, the product has a second derivative."""
        y = times_coded(x, self.codes, self.bits, self.rounded, self.in_features, twice=twice)
        return y if bias is None else y + bias.to(y.dtype)

    def to_store(self) -> dict[str, torch.Tensor]:
        """Return the masters, which the host rounds."""
        return self.masters

    def stored(self, arrived: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors as an emulator stores them, by ending, from the masters on the host."""
        assert self.factor_dtype is not None
        return coded_tensors(self.codes, self.bits, arrived, self.factor_dtype)


def times_coded(
    x: torch.Tensor, codes: torch.Tensor, bits: int, used: Mapping[str, torch.Tensor], in_features: int, *, twice: bool
) -> torch.Tensor:
    """Multiply (N, in) by a weight coded in `bits` with residual factors, if it has any, to (N, out); `used` by ending.

    With `twice`, the product has a second derivative: autograd's own, which keeps the weight.
    """
    coded = Coded(codes.to(x.device), used[SCALES], used[CODEBOOK], bits)
    y = x @ decode_with(coded, in_features).to(x.dtype).T if twice else coded_product(x, coded, in_features)
    return y + (x @ used[DOWN].to(x.dtype).T) @ used[UP].to(x.dtype) if UP in used else y


def coded_tensors(
    codes: torch.Tensor, bits: int, masters: Mapping[str, torch.Tensor], factor_dtype: FactorDtype
) -> dict[str, torch.Tensor]:
    """Return what is stored of a weight coded in `bits`, by ending, from its codes and masters on the host."""
    scales, codebook = (masters[ending].to(torch.bfloat16) for ending in (SCALES, CODEBOOK))
    rows, codebook = Coded(codes, scales, codebook, bits).packed()
    factors = {ending: quantize_matrix(masters[ending], factor_dtype) for ending in (UP, DOWN) if ending in masters}
    return {CODES: rows, CODEBOOK: codebook, **factors}


def trained_linear(emulator: Emulator, name: str, dtype: torch.dtype, device: torch.device) -> TrainedLinear:
    """Return the trainable replacement of a linear, in the form that it has in the emulator."""
    kind = TrainedCodes if name in emulator.facts.codes else TrainedLinear
    return kind(emulator, name, dtype, device)
