"""What a factorisation leaves of a matrix in; the same in a few bits a value out, packed into bytes. Pure numerics.

Shapes: T rows, n columns, b bits, m = n b / 8 bytes a row. A value is rounded to one of 2^b evenly spaced levels times
a scale of its row and one of its column: what is left of activations by their leading directions is near to normally
distributed, once massive rows and columns are scaled.
"""

from dataclasses import dataclass

import torch

# Distance of the levels with the least squared error for a normal distribution (Max, "Quantizing for minimum
# distortion", 1960), over its mean magnitude sqrt(2 / pi); what is lost is 0.363, 0.119 and 0.012 of the square.
_STEPS = {1: 1.5958 / 0.79788, 2: 0.9957 / 0.79788, 4: 0.3352 / 0.79788}


@dataclass(frozen=True)
class Residual:
    """R as `scale_t1 * scale_n * (codes - middle)`, 8 / b codes in each byte of `codes_tm`.

    Byte j of a row holds the columns j, j + m, j + 2m, ..., the first in its lowest bits.
    """

    codes_tm: torch.Tensor
    scale_t1: torch.Tensor
    scale_n: torch.Tensor
    bits: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory."""
        return [self.codes_tm, self.scale_t1, self.scale_n]

    def add_to(self, matrix_tn: torch.Tensor) -> torch.Tensor:
        """`matrix_tn` plus the approximation, in place."""
        planes = [(self.codes_tm >> shift) & (2**self.bits - 1) for shift in range(0, 8, self.bits)]
        steps_tn = torch.cat(planes, dim=1)[:, : matrix_tn.shape[1]].to(matrix_tn.dtype)
        steps_tn = steps_tn.sub_((2**self.bits - 1) / 2).mul_(self.scale_n.to(matrix_tn.dtype))
        return matrix_tn.addcmul_(steps_tn, self.scale_t1.to(matrix_tn.dtype))


def pack(residual_tn: torch.Tensor, bits: int) -> Residual:
    """Store `residual_tn` (T, n), which is used up. Values that are not finite spoil scales, and so stay visible."""
    scale_t1, scale_n = _scales(residual_tn.abs())
    step_t1 = (_STEPS[bits] * scale_t1).bfloat16()
    steps_tn = residual_tn.mul_(_inverse(scale_n.to(residual_tn.dtype))).mul_(_inverse(step_t1.to(residual_tn.dtype)))
    top = 2**bits - 1
    codes_tn = steps_tn.nan_to_num_(0).add_((top + 1) / 2).clamp_(0, top).to(torch.uint8)  # cut down, not rounded
    columns = -(-residual_tn.shape[1] * bits // 8)
    codes_tn = torch.nn.functional.pad(codes_tn, (0, columns * 8 // bits - residual_tn.shape[1]))
    first, *others = codes_tn.split(columns, dim=1)
    codes_tm = first.clone()
    for place, plane in enumerate(others, start=1):
        codes_tm |= plane << place * bits
    return Residual(codes_tm, step_t1, scale_n, bits)


def _scales(magnitude_tn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean magnitude of each row (T, 1) when columns are divided by theirs (n); empty columns do not count.

    Columns are averaged over rows of equal length, so that a massive row does not give its profile to all others; the
    rows' own scale comes from columns of equal size, so that a massive column does not blur the rest of its row.
    """
    length_t1 = magnitude_tn.mean(1, keepdim=True, dtype=torch.float32)
    profile_n = (_inverse(length_t1).to(magnitude_tn.dtype).T @ magnitude_tn).squeeze(0).float()
    scale_n = (profile_n / len(magnitude_tn)).bfloat16()
    inverse_n1 = _inverse(scale_n.to(magnitude_tn.dtype)).unsqueeze(1)
    return magnitude_tn @ inverse_n1 / inverse_n1.count_nonzero().clamp_min(1), scale_n


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and zero where the scale is zero or as good as that."""
    return torch.where(scale.abs() <= torch.finfo(torch.bfloat16).tiny, 0, 1 / scale)
