"""What compression saves and what it costs in exactness: figures of one forward pass, collected while it runs."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from onelayer.compiler.factors.activation_factors import Compressed


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


class SavedBytes:
    """Counts what autograd keeps for the backward pass inside `with`: bytes of distinct storages, parameters left out.

    The inputs that torch's checkpointing keeps to recompute from are among them. Compression counts what it keeps
    itself, tensors as they are too, which autograd saves by the way.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def total(self, compression: Figures | None = None) -> int:
        """Bytes counted so far, with those that `compression` counted itself."""
        if compression is None:
            return sum(self._sizes.values())
        counted = {tensor.untyped_storage().data_ptr() for tensor in compression.exact}
        return compression.total_bytes + sum(size for at, size in self._sizes.items() if at not in counted)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._resident:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
