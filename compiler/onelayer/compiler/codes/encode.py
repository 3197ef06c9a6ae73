"""A weight and the moments of its inputs in, codes out, and back. Pure.

W ~ scale * C[codes]: `width` neighbors in a row of W (out, in) are one row of the codebook C (256, width) times a
scale. Columns are coded in order, and the columns to the right make up for the error of those on the left, as GPTQ does
(arXiv 2210.17323) with codebooks of vectors (arXiv 2402.15319). Shape letters: O outputs, I inputs, d code width.
"""

import math
from dataclasses import dataclass

import torch

from onelayer.compiler.codes.codebook import normal_codebook
from onelayer.compiler.codes.forms import CODEBOOK_ROWS, CodeWidth, group_size
from onelayer.compiler.factors.expectations import LOOKING, Expectations, cholesky
from onelayer.compiler.factors.stored_forms import SCALE_BYTES
from onelayer.compiler.machine.transfers import upload

# Added to the moments' diagonal, as shares of its mean: directions that calibration hardly saw count a little, the more
# so the fewer rows it had for each of them. Measured: half the inputs by the rows is near the best for 1536 to 14,000.
LEAST_DAMPING, DAMPING_PER_ROW = 1e-2, 0.5
# Errors within this many columns are handed on one by one, beyond it all at once, so that large products do the work.
LAZY_COLUMNS = 128
# A padded column after the last input costs nothing: its entry in the feedback is this large.
FREE = 1e6


@dataclass(frozen=True)
class Coded:
    """A coded weight: `codes` uint8 (O, ceil(I / d)), `scales` (O, groups) and `codebook` (256, d), both bfloat16."""

    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes with scales, and the codebook, as rows of bytes, which no cast of a model changes."""
        rows = torch.cat([self.codes, self.scales.contiguous().view(torch.uint8)], dim=1)
        return rows, self.codebook.contiguous().view(torch.uint8)


def unpacked(rows: torch.Tensor, codebook: torch.Tensor, in_features: int) -> Coded:
    """Read packed codes back; views where that is possible."""
    scale_bytes = SCALE_BYTES * -(-in_features // group_size(in_features))
    scales = rows[:, -scale_bytes:].contiguous().view(torch.bfloat16)
    return Coded(rows[:, :-scale_bytes], scales, codebook.contiguous().view(torch.bfloat16))


def decode(coded: Coded, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute the weight (O, I) that codes stand for, in `dtype`."""
    return decode_with(coded.codes, coded.codebook.to(dtype), coded.scales.to(dtype), in_features)


def decode_with(codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor, in_features: int) -> torch.Tensor:
    """Compute scale * C[codes] (O, I); differentiable in the codebook and the scales.

    Without gradients it is scaled in place, so that the weight is held once.
    """
    values = torch.nn.functional.embedding(codes.int(), codebook).reshape(len(codes), -1)[:, :in_features]
    if torch.is_grad_enabled() and (codebook.requires_grad or scales.requires_grad):
        return values * scales.repeat_interleave(group_size(in_features), dim=1)[:, :in_features]
    for part, scale in zip(values.split(group_size(in_features), dim=1), scales.split(1, dim=1), strict=True):
        part.mul_(scale)
    return values


def encode(
    W: torch.Tensor,
    moments: torch.Tensor,
    width: CodeWidth,
    rows: float | torch.Tensor = math.inf,
    expected: Expectations = LOOKING,
) -> Coded:
    """Code W (O, I) for inputs of the given second moments, blocks (B, b, b) along their diagonal, over so many rows.

    Every code is the nearest at its turn, in the metric of what the columns to its right cannot make up for.
    """
    W, in_features, block = W.to(torch.float32), W.shape[1], moments.shape[-1]
    scales = _scales(W)
    codebook = upload(normal_codebook(width), W.device)
    left = torch.nn.functional.pad(W, (0, -in_features % width)).clone()
    codes = torch.empty(len(W), left.shape[1] // width, dtype=torch.uint8, device=W.device)
    share = DAMPING_PER_ROW * block / torch.as_tensor(rows, dtype=torch.float64).clamp_min(1)
    damping = share.clamp_min(LEAST_DAMPING)
    for index, known in enumerate(moments):
        start = index * block
        end = min(start + block, in_features)
        stop = left.shape[1] if end == in_features else end
        feedback = _feedback(known[: end - start, : end - start], stop - start, damping, expected)
        scale = scales[:, index : index + 1].to(torch.float32)
        _encode_block(left[:, start:stop], scale, feedback, codebook, codes[:, start // width :])
    return Coded(codes, scales, codebook.to(torch.bfloat16))


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


def _encode_block(
    left: torch.Tensor, scale: torch.Tensor, feedback: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor
) -> None:
    """Code the columns of `left` (O, C), which holds the weight and takes up the errors, by one scale a row, (O, 1)."""
    width, columns = codebook.shape[1], left.shape[1]
    step = width * max(1, LAZY_COLUMNS // width)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = torch.zeros(len(left), stop - start, device=left.device)
        near = feedback[start:stop, start:stop]
        for first in range(0, stop - start, width):
            own = slice(start + first, start + first + width)
            # A triangle whose diagonal is positive has an inverse, so nobody looks whether this one failed.
            inverse = torch.linalg.inv_ex(near[first : first + width, first : first + width]).inverse
            chosen = nearest((left[:, own] / scale) @ inverse, codebook @ inverse)
            codes[:, own.start // width] = chosen.to(torch.uint8)
            error = (left[:, own] - codebook[chosen] * scale) @ inverse
            errors[:, first : first + width] = error
            left[:, own.stop : stop] -= error @ near[first : first + width, first + width :]
        left[:, stop:] -= errors @ feedback[start:stop, stop:]


def nearest(points: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the nearest of the codebook's rows (256, d) to each of the points (N, d)."""
    assert len(codebook) == CODEBOOK_ROWS
    lengths = codebook.square().sum(dim=1)
    return torch.addmm(lengths[None], points, codebook.T, alpha=-2).argmin(dim=1)
