"""Where the values of one tensor lie in another, and how they are scaled on the way: found by probing, then applied.

`there[i] = scale[i] * here[place[i]] + shift[i]`: a packed latent, a latent in the VAE's scale, or a prediction in the
answer of a denoiser.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# A probe in float32 is exact to more than this; rounding in half precision is not.
TOLERANCE = 1e-3


class NotALayoutError(ValueError):
    """A function that does more than move and scale values."""


@dataclass(frozen=True)
class Layout:
    """A map of values. `shape` is that of `here`; `scale` and `shift` have the shape of `there`."""

    shape: tuple[int, ...]
    place: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def found(cls, shape: tuple[int, ...], through: Callable[[torch.Tensor], torch.Tensor]) -> "Layout":
        """Find what `through` does to flat values; it runs once for each bit of a place.

        Raises `NotALayoutError` if it does anything else than move and scale them.
        """
        count = int(torch.Size(shape).numel())
        shift = through(torch.zeros(count)).double()
        scale = through(torch.ones(count)).double() - shift
        if not bool((scale != 0).all()):
            raise NotALayoutError("some values depend on nothing")
        place = torch.zeros(shift.shape, dtype=torch.long)
        numbers = torch.arange(count)
        for bit in range(max(1, (count - 1).bit_length())):
            seen = (through((numbers >> bit & 1).float()).double() - shift) / scale
            place += seen.round().long() << bit
        if int(place.min()) < 0 or int(place.max()) >= count:
            raise NotALayoutError("values are mixed")
        layout = cls(shape, place.flatten(), scale, shift)
        probe = torch.randn(count, generator=torch.Generator().manual_seed(0))
        wanted = through(probe).double()
        if float((layout.forward(probe.double()) - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
            raise NotALayoutError("values are changed by more than a scale and a shift")
        return layout

    def forward(self, here: Any) -> torch.Tensor:
        """Map a tensor, or the tensors of a tree one after another; gradients flow back."""
        values = torch.cat([leaf.reshape(-1) for leaf in tree_leaves(here) if isinstance(leaf, torch.Tensor)])
        scale, shift = (part.to(values.device, values.dtype) for part in (self.scale, self.shift))
        return scale * values[self.place.to(values.device)].reshape(scale.shape) + shift

    def backward(self, there: torch.Tensor) -> torch.Tensor:
        """Map back. Raises `NotALayoutError` unless every value of `here` lies in `there`."""
        if self.place.numel() != torch.Size(self.shape).numel():
            raise NotALayoutError("not every value can be found again")
        values = torch.empty(self.place.numel(), dtype=torch.double)
        values[self.place] = ((there.double().reshape(self.scale.shape) - self.shift) / self.scale).flatten()
        return values.reshape(self.shape)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return what is stored, by name."""
        shape = torch.tensor(self.shape, dtype=torch.long)
        parts = {"shape": shape, "place": self.place, "scale": self.scale.float(), "shift": self.shift.float()}
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in parts.items()}

    @classmethod
    def stored(cls, tensors: Mapping[str, torch.Tensor], prefix: str) -> "Layout":
        """Read what `tensors` returned."""
        place, scale, shift = (tensors[f"{prefix}.{name}"] for name in ("place", "scale", "shift"))
        return cls(tuple(tensors[f"{prefix}.shape"].tolist()), place, scale, shift)
