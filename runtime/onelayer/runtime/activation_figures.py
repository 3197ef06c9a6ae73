"""What compression saves and what it costs in exactness: figures of one forward pass, collected while it runs."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from onelayer.compiler.qb import Compressed


@dataclass
class Figures:
    """Bytes kept for the backward pass by category, and relative errors and ranks by layer, as they come up."""

    saved_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ranks: dict[str, list[int | None]] = field(default_factory=lambda: defaultdict(list))
    with_errors: bool = True
    # Tensors that are kept as they are: autograd saves the very same, so who counts what it saves leaves them out.
    exact: list[torch.Tensor] = field(default_factory=list)
    # Tensors counted so far, held so that no other takes their address.
    _shared: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(self.saved_bytes.values())

    def add(self, category: str, saved_bytes: int) -> None:
        """Count something that only one layer keeps."""
        self.saved_bytes[category] += saved_bytes

    def add_shared(self, tensor: torch.Tensor) -> None:
        """Count a tensor that several layers refer to, once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._shared:
            self._shared[storage.data_ptr()] = tensor
            self.add("shared inputs", storage.nbytes())

    @torch.no_grad()
    def compare(self, layer: str, exact: torch.Tensor, compressed: Compressed, tokens: torch.Tensor | None) -> None:
        """Note the rank, and the error over the tokens that are no padding."""
        self.ranks[layer].append(compressed.rank)
        if not self.with_errors:
            return
        difference = (compressed.rebuild() - exact).float().flatten(0, -2)
        wide = exact.float().flatten(0, -2)
        if tokens is not None:
            difference, wide = difference[tokens], wide[tokens]
        size = wide.norm().item()
        self.errors[layer].append(difference.norm().item() / size if size else 0.0)
