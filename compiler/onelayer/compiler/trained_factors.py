"""The factors of an emulator's linear as they are trained: float32, rounded for every step as they will be stored.

Letters: k rank, N tokens, out / in features. `up` is held transposed, so that each direction is a row of both factors.
"""

import torch

from onelayer.compiler.emulator_reader import DENSE, DOWN, UP, Emulator
from onelayer.compiler.quantize import pack, unpack


class TrainedLinear:
    """What stands for one linear's weight. `masters` by ending: up (k, out) and down (k, in), or the whole (out, in).

    Products use the masters as `round` last found them in the form in which they are stored, and leave gradients
    there; `hand_gradients` gives them to the masters as if nothing had been rounded (straight-through estimator,
    arXiv 1308.3432).
    """

    def __init__(self, emulator: Emulator, name: str, dtype: torch.dtype, device: torch.device) -> None:
        first, second = emulator.factors(name)
        found = {DENSE: first} if second is None else {UP: first.T, DOWN: second}
        self.kind, self.dtype = emulator.facts.packed, dtype
        self.masters = {ending: factor.to(device, torch.float32).contiguous() for ending, factor in found.items()}
        self.rounded: dict[str, torch.Tensor] = {}
        self.round()

    def round(self) -> None:
        """Take the masters over as they are now."""
        kind, dtype = self.kind, self.dtype
        for ending, master in self.masters.items():
            found = master.to(dtype) if kind is None else unpack(pack(master, kind), master.shape[1], kind, dtype)
            self.rounded[ending] = found.float().detach().requires_grad_()

    def hand_gradients(self) -> None:
        """The gradients of what products used since the last `round` become those of the masters."""
        for ending, master in self.masters.items():
            master.grad = self.rounded[ending].grad

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(N, in) -> (N, out), as the emulator computes it."""
        used = {ending: factor.to(x.dtype) for ending, factor in self.rounded.items()}
        y = x @ used[DENSE].T if DENSE in used else (x @ used[DOWN].T) @ used[UP]
        return y if bias is None else y + bias.to(y.dtype)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors as an emulator holds them, by the ending of their names."""
        if self.kind is not None:
            return {ending: pack(master, self.kind) for ending, master in self.masters.items()}
        return {
            ending: (master.T if ending == UP else master).to(self.dtype).contiguous()
            for ending, master in self.masters.items()
        }
