"""The compressed copies of tensors that are stored for backward, and the figures of what they take.

In: a tensor of a layer. Out: what is stored instead of it. A tensor that several sub-blocks read is stored once.
"""

import zlib
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from onelayer.compiler.factors.activation_factors import Compressed, ExactTensor, compress
from onelayer.runtime.activations.figures import Figures
from onelayer.runtime.activations.recompute import StandIn


def features_rank(rank: int | float | None, features: int) -> int | None:
    """Return a rank as a number; it may be a share of the features. None keeps everything exactly."""
    return rank if rank is None or isinstance(rank, int) else max(1, round(rank * features))


class StoredCopies:
    """Compresses tensors to `rank` (a number, or a share of the features) and finds the copy of a tensor again.

    `figures` collects what the copies take while they are measured.
    """

    def __init__(self, rank: int | float | None, residual_bits: int, seed: int) -> None:
        self.rank, self.residual_bits, self.seed = rank, residual_bits, seed
        self.figures: Figures | None = None
        self._copies: Any = WeakTensorKeyDictionary()
        self._generators: dict[torch.device, torch.Generator] = {}

    def compress(self, tensor: torch.Tensor, name: str, category: str, tokens: torch.Tensor | None) -> Compressed:
        """Compress a tensor of the layer `name`; `tokens` are the rows that are not padding.

        The generator's state depends on the name alone, so that a resumed run draws the same numbers.
        """
        generator = self._generators.setdefault(tensor.device, torch.Generator(tensor.device))
        generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        compressed = compress(tensor, features_rank(self.rank, tensor.shape[-1]), generator, tokens, self.residual_bits)
        if self.figures is not None:
            self.figures.add(category, compressed.saved_bytes)
            if isinstance(compressed, ExactTensor):
                self.figures.exact.append(compressed.tensor)
            self.figures.compare(name, tensor, compressed, tokens)
        return compressed

    def remember(self, tensor: torch.Tensor, copy: StandIn) -> None:
        """Keep what is stored of a tensor, for others that receive the same tensor."""
        self._copies[tensor] = (copy, tensor._version)

    def copy_of(self, tensor: torch.Tensor) -> StandIn | None:
        """Return what is stored of a tensor, unless the tensor was changed in place since."""
        copy, version = self._copies.get(tensor, (None, 0))
        return copy if copy is not None and version == tensor._version else None

    def count(self, category: str, saved_bytes: int) -> None:
        """Count bytes that are stored uncompressed."""
        if self.figures is not None:
            self.figures.add(category, saved_bytes)

    def count_shared(self, tensor: torch.Tensor) -> None:
        """Count a tensor that several layers refer to, once."""
        if self.figures is not None:
            self.figures.add_shared(tensor)
