"""A weight and the moments of its inputs in, codes out, and back. Pure.

W ~ scale * C[windows]: `width` neighbors in a row of W (out, in) are one row of the codebook C (256, width) times a
scale. Columns are coded in order, and the columns to the right make up for the error of those on the left, as GPTQ does
(arXiv 2210.17323) with codebooks of vectors (arXiv 2402.15319). Shape letters: O outputs, I inputs, d code width.
"""

import math
from dataclasses import dataclass, replace

import torch

from onelayer.compiler.codes.codebook import normal_codebook
from onelayer.compiler.codes.forms import CodeShape, group_size
from onelayer.compiler.codes.search import best_windows
from onelayer.compiler.codes.windows import looked_up, packed_windows, windows
from onelayer.compiler.factors.expectations import LOOKING, Expectations, cholesky
from onelayer.compiler.factors.stored_forms import SCALE_BYTES
from onelayer.compiler.machine.transfers import upload

# Added to the moments' diagonal, as shares of its mean: directions that calibration hardly saw count a little, the more
# so the fewer rows it had for each of them. Measured: half the inputs by the rows is near the best for 1536 to 14,000.
LEAST_DAMPING, DAMPING_PER_ROW = 1e-2, 0.5
# A padded column after the last input costs nothing: its entry in the feedback is this large.
FREE = 1e6


@dataclass(frozen=True)
class Coded:
    """A coded weight: `codes` of `bits` bits, uint8 (O, bytes), `scales` (O, groups) and `codebook` (256, d).

    Scales and codebook are bfloat16 where they are stored.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor
    bits: int

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes with scales, and the codebook, as rows of bytes, which no cast of a model changes."""
        rows = torch.cat([self.codes, self.scales.contiguous().view(torch.uint8)], dim=1)
        return rows, self.codebook.contiguous().view(torch.uint8)


def unpacked(rows: torch.Tensor, codebook: torch.Tensor, in_features: int, bits: int) -> Coded:
    """Read packed codes of `bits` bits back; views where that is possible."""
    scale_bytes = SCALE_BYTES * -(-in_features // group_size(in_features))
    scales = rows[:, -scale_bytes:].contiguous().view(torch.bfloat16)
    return Coded(rows[:, :-scale_bytes], scales, codebook.contiguous().view(torch.bfloat16), bits)


def decode(coded: Coded, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute the weight (O, I) that codes stand for, in `dtype`."""
    return decode_with(replace(coded, codebook=coded.codebook.to(dtype), scales=coded.scales.to(dtype)), in_features)


def decode_with(coded: Coded, in_features: int, first: int = 0) -> torch.Tensor:
    """Compute scale * C[windows] (O, I), differentiable in the codebook and the scales, from code `first` on.

    Without gradients it is scaled in place, so that the weight is held once.
    """
    codebook, scales, count = coded.codebook, coded.scales, -(-in_features // coded.codebook.shape[1])
    chosen = windows(coded.codes, coded.bits, count, first)
    needs_grad = torch.is_grad_enabled() and (codebook.requires_grad or scales.requires_grad)
    entries = torch.nn.functional.embedding(chosen.int(), codebook) if needs_grad else looked_up(chosen, codebook)
    values = entries.reshape(len(chosen), -1)[:, :in_features]
    if needs_grad:
        return values * scales.repeat_interleave(group_size(in_features), dim=1)[:, :in_features]
    for part, scale in zip(values.split(group_size(in_features), dim=1), scales.split(1, dim=1), strict=True):
        part.mul_(scale)
    return values


def encode(
    W: torch.Tensor,
    moments: torch.Tensor,
    shape: CodeShape,
    rows: float | torch.Tensor = math.inf,
    expected: Expectations = LOOKING,
) -> Coded:
    """Code W (O, I) for inputs of the given second moments, blocks (B, b, b) along their diagonal, over so many rows.

    Codes follow the best path, in the metric of what the columns to their right cannot make up for.
    """
    W, block = W.to(torch.float32), moments.shape[-1]
    scales = _scales(W)
    codebook = upload(normal_codebook(shape), W.device)
    share = DAMPING_PER_ROW * block / torch.as_tensor(rows, dtype=torch.float64).clamp_min(1)
    damping = share.clamp_min(LEAST_DAMPING)
    found: list[torch.Tensor] = []
    for index, known in enumerate(moments):
        part = W[:, index * block : (index + 1) * block] / scales[:, index : index + 1].to(torch.float32)
        size = part.shape[1]
        left = torch.nn.functional.pad(part, (0, -size % shape.width))
        feedback = _feedback(known[:size, :size], left.shape[1], damping, expected)
        found.append(best_windows(left, feedback, codebook, shape.bits, found[-1][:, -1] if found else None))
    codes = packed_windows(torch.cat(found, dim=1), shape.bits)
    return Coded(codes, scales, codebook.to(torch.bfloat16), shape.bits)


def _scales(W: torch.Tensor) -> torch.Tensor:
    """Compute the root mean square of every group of a row, (O, groups); a group of zeros gets the least scale."""
    groups = [part.square().mean(dim=1).sqrt() for part in W.split(group_size(W.shape[1]), dim=1)]
    return torch.stack(groups, dim=1).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)


def _feedback(known: torch.Tensor, size: int, damping: torch.Tensor, expected: Expectations) -> torch.Tensor:
    """Compute the upper Cholesky factor (size, size) of the inverse of one block of moments, damped.

    Columns beyond the block are padding, whose error costs nothing.
    """
    known = known.to(torch.float64)
    mean = known.diagonal().mean()
    damped = torch.where(mean > 0, known / mean, 0.0)
    damped = damped + damping * torch.eye(len(known), dtype=torch.float64, device=known.device)
    inverse = torch.cholesky_inverse(cholesky(damped, expected))
    upper = cholesky(inverse, expected, upper=True).to(torch.float32)
    if size == len(upper):
        return upper
    padded = FREE * torch.eye(size, dtype=upper.dtype, device=upper.device)
    padded[: len(upper), : len(upper)] = upper
    return padded
