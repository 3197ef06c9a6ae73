"""An offset of hidden states in, its stored form of a few bits a value out. Pure.

An offset is what one model's hidden states have more than another's. In 1, 2 or 4 bits a value it has a scale per token
and one per feature, and loses 0.363, 0.119 or 0.012 of its square if its values are normally distributed.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.factors.activation_factors import Residual, quantize_residual
from onelayer.compiler.factors.stored_forms import EXACT_BITS


@dataclass(frozen=True)
class CodedOffset:
    """An offset of shape `shape` (..., n), as float32 or as codes of its rows (T, n)."""

    stored: torch.Tensor | Residual
    shape: torch.Size

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory."""
        return [self.stored] if isinstance(self.stored, torch.Tensor) else self.stored.tensors

    @property
    def stored_bytes(self) -> int:
        """What is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def to(self, device: torch.device) -> "CodedOffset":
        """Return the same on `device`."""
        if isinstance(self.stored, torch.Tensor):
            return CodedOffset(self.stored.to(device), self.shape)
        codes_tm, scale_t1, scale_n = (tensor.to(device) for tensor in self.stored.tensors)
        return CodedOffset(Residual(codes_tm, scale_t1, scale_n, self.stored.bits), self.shape)

    def rebuild(self) -> torch.Tensor:
        """Return the offset in float32; an offset of zero comes back as exactly zero."""
        if isinstance(self.stored, torch.Tensor):
            return self.stored
        empty_tn = self.stored.scale_t1.new_zeros(len(self.stored.codes_tm), self.shape[-1], dtype=torch.float32)
        return self.stored.add_to(empty_tn).reshape(self.shape)


def code_offset(offset: torch.Tensor, bits: int) -> CodedOffset:
    """Code `offset` (..., n), which may be overwritten, with `bits` a value: 1, 2 or 4, or 32 to keep it exactly."""
    values = offset.float()
    if bits == EXACT_BITS:
        return CodedOffset(values, offset.shape)
    return CodedOffset(quantize_residual(values.reshape(-1, offset.shape[-1]), bits), offset.shape)
