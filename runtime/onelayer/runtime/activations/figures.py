"""What compression saves and how much exactness it costs: figures of one forward pass, collected while it runs."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from onelayer.compiler.factors.activation_factors import Compressed


@dataclass
class Figures:
    """Bytes kept for the backward pass by category, and relative errors and ranks by layer."""

    saved_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ranks: dict[str, list[int | None]] = field(default_factory=lambda: defaultdict(list))
    with_errors: bool = True
    # Tensors that are kept uncompressed. Autograd saves the same tensors, so `SavedBytes` does not count them again.
    exact: list[torch.Tensor] = field(default_factory=list)
    # Tensors counted so far, held so that no other tensor gets their address.
    _shared: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """The sum over all categories."""
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
        """Record the rank, and the error over the tokens that are not padding."""
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
    """Counts what autograd keeps for the backward pass inside `with`: bytes of distinct storages, without parameters.

    This includes the inputs from which torch's checkpointing recomputes. Compression counts what it keeps itself,
    including uncompressed tensors, which autograd saves too.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def total(self, compression: Figures | None = None) -> int:
        """Return the bytes counted so far, with those that `compression` counted itself."""
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
