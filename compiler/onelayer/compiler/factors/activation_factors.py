"""A matrix of activations in, two thin factors of short numbers out: sampled orthogonal decomposition. Pure.

Shapes: T tokens (rows), n features (columns), k the rank, A (T, n) the activations, A_S (k, n) rows sampled of it.
LoRAct (arXiv 2509.23472) sketches A with its own rows, Y = A A_S^T, and keeps Q = orth(Y) and Q^T A. This file differs
in five ways, measured in manifests/LOG.md. Rows are drawn by their norm, so that no massive row is missed. A is
projected onto orth(A^T A orth(A_S^T)), which is closer to A at the same cost and needs no decomposition of length T.
The long factor is stored in 8 bits and the other in 16; this rounding is far below the loss from the rank. The rest of
A is stored in two bits a value; LoRAct drops it. Rows of padding are left out.
"""

from dataclasses import dataclass

import torch

from onelayer.compiler.factors.stored_forms import RESIDUAL_BITS, is_factored

# Other dtypes (8-bit floats, integers) are stored unchanged: they are small already, or not activations.
FACTORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEVELS = 127  # levels of int8 on each side of zero


@dataclass(frozen=True)
class ExactTensor:
    """A tensor that is stored unchanged, since factors would not be smaller."""

    tensor: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory."""
        return [self.tensor]

    @property
    def saved_bytes(self) -> int:
        """What is stored."""
        return _bytes_of(self.tensors)

    @property
    def rank(self) -> int | None:
        """None, since the tensor is not factored."""
        return None

    def rebuild(self) -> torch.Tensor:
        """Return the tensor itself, as a new leaf."""
        return self.tensor.detach()


@dataclass(frozen=True)
class Residual:
    """A residual R as `scale_t1 * scale_n * (codes - middle)`, with 8 / b codes in each byte of `codes_tm`.

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
        """Add the approximation to `matrix_tn` in place."""
        planes = [(self.codes_tm >> shift) & (2**self.bits - 1) for shift in range(0, 8, self.bits)]
        steps_tn = torch.cat(planes, dim=1)[:, : matrix_tn.shape[1]].to(matrix_tn.dtype)
        steps_tn = steps_tn.sub_((2**self.bits - 1) / 2).mul_(self.scale_n.to(matrix_tn.dtype))
        return matrix_tn.addcmul_(steps_tn, self.scale_t1.to(matrix_tn.dtype))


@dataclass(frozen=True)
class ActivationFactors:
    """A as `scale_t1 * left_tk @ (scale_k1 * right_kn)`, plus a residual. `tokens` are its rows; others are zero.

    `left_tk` holds bytes, with a scale per token and one per direction, and `right_kn` is bfloat16. So a massive token
    or channel does not cost the others their precision. The residual is what the rounded factors leave out, or None if
    it is not stored. `tokens` is None if all rows are stored.
    """

    left_tk: torch.Tensor
    right_kn: torch.Tensor
    scale_t1: torch.Tensor
    scale_k1: torch.Tensor
    residual: Residual | None
    tokens: torch.Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory, except `tokens`, one list for all layers."""
        further = [] if self.residual is None else self.residual.tensors
        return [self.left_tk, self.right_kn, self.scale_t1, self.scale_k1, *further]

    @property
    def saved_bytes(self) -> int:
        """What is stored."""
        return _bytes_of(self.tensors)

    @property
    def rank(self) -> int | None:
        """The number k of directions."""
        return self.right_kn.shape[0]

    def rebuild(self) -> torch.Tensor:
        """Compute the approximation, in the shape and precision of the original tensor."""
        with torch.autocast(self.left_tk.device.type, enabled=False):
            product_tn = _product(self.left_tk, self.scale_t1, self.scale_k1, self.right_kn, _work_dtype(self.dtype))
            if self.residual is not None:
                product_tn = self.residual.add_to(product_tn)
        if self.tokens is not None:
            rows = self.shape.numel() // self.shape[-1]
            product_tn = product_tn.new_zeros(rows, self.shape[-1]).index_copy_(0, self.tokens, product_tn)
        return product_tn.to(self.dtype).reshape(self.shape)


Compressed = ExactTensor | ActivationFactors


@torch.no_grad()
def compress(
    tensor: torch.Tensor,
    rank: int | None,
    generator: torch.Generator,
    tokens: torch.Tensor | None = None,
    residual_bits: int = RESIDUAL_BITS,
) -> Compressed:
    """Factor `tensor` (..., n) to rank `rank` and round what is left to `residual_bits` a value (0, 1, 2 or 4).

    The tensor is stored unchanged if `rank` is None, or if the result would not be smaller.

    `tokens` (int64, over the flattened leading dimensions) are the rows that matter. Other rows are padding: they carry
    no weight and, if the tensor is factored, come back as zeros.
    """
    if rank is None or tensor.dtype not in FACTORED_DTYPES or tensor.ndim < 2 or tensor.numel() == 0:
        return ExactTensor(tensor.detach())
    features = tensor.shape[-1]
    rows = len(tokens) if tokens is not None else tensor.numel() // features
    if not is_factored(rows, features, rank, residual_bits, tensor.numel() * tensor.element_size()):
        return ExactTensor(tensor.detach())
    activations_tn = tensor.detach().reshape(-1, features)
    if tokens is not None:
        activations_tn = activations_tn.index_select(0, tokens)
    left_tk, right_kn = project(activations_tn, rank, generator)
    bytes_tk, scale_t1, scale_k = _to_bytes(left_tk)
    rounded = (bytes_tk, scale_t1, scale_k.unsqueeze(1), right_kn.bfloat16())
    residual = None
    if residual_bits:
        with torch.autocast(tensor.device.type, enabled=False):
            product_tn = _product(*rounded, _work_dtype(tensor.dtype))
            residual = quantize_residual(product_tn.neg_().add_(activations_tn), residual_bits)
    bytes_tk, scale_t1, scale_k1, short_kn = rounded
    return ActivationFactors(bytes_tk, short_kn, scale_t1, scale_k1, residual, tokens, tensor.shape, tensor.dtype)


def project(activations_tn: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute C (T, k) and V (k, n) with orthonormal rows and A close to C V = A V^T V; rank is below both T and n.

    A non-finite number in A gives non-finite numbers in the result.
    """
    work = _work_dtype(activations_tn.dtype)
    exact = torch.float64 if work == torch.float64 else torch.float32
    with torch.autocast(activations_tn.device.type, enabled=False):
        a_tn = activations_tn.to(work)
        sample_kn = a_tn.index_select(0, sample_rows(a_tn, rank, generator))
        basis_nk = torch.linalg.qr(sample_kn.T.to(exact)).Q.to(work)
        sketch_tk = a_tn @ basis_nk
        # The sketch is scaled so that no product of two activations leaves the range of the dtype.
        sketch_tk = sketch_tk / sketch_tk.abs().amax(0).clamp_min(torch.finfo(work).tiny)
        basis_nk = torch.linalg.qr((a_tn.T @ sketch_tk).to(exact)).Q.to(work)
        return a_tn @ basis_nk, basis_nk.T


def sample_rows(activations_tn: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` different rows with probability proportional to their squared norms (Efraimidis and Spirakis).

    A row far longer than the others is almost certainly drawn. The longest rows come first: if the sample is
    orthonormalized in this order, they leave no traces in the other directions.
    """
    norms_t = torch.linalg.vector_norm(activations_tn.float(), dim=1)
    noise_t = torch.empty_like(norms_t).exponential_(generator=generator)
    # These are logarithms of norm^2 / noise, since squares would leave float32's range.
    rows: torch.Tensor = (2 * norms_t.log() - noise_t.log()).topk(count, sorted=False).indices
    return rows[norms_t[rows].argsort(descending=True)]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for products: in float16 they can overflow although their factors do not."""
    return torch.float32 if dtype == torch.float16 else dtype


def _product(
    left_tk: torch.Tensor, scale_t1: torch.Tensor, scale_k1: torch.Tensor, right_kn: torch.Tensor, work: torch.dtype
) -> torch.Tensor:
    """Multiply the rounded factors to (T, n)."""
    return (left_tk.to(work) @ (scale_k1 * right_kn.float()).to(work)).mul_(scale_t1)


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _to_bytes(factor_tk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to integers from -127 to 127, with a bfloat16 scale per row and a float32 scale per column."""
    scale_t1 = factor_tk.abs().amax(1, keepdim=True).bfloat16()
    rows_tk = _divided(factor_tk, scale_t1)
    scale_k = rows_tk.abs().amax(0).float() / _LEVELS
    # A non-finite value has no byte; the scale of its row carries it.
    steps_tk = _divided(rows_tk, scale_k).nan_to_num(0).round().clamp_(-_LEVELS, _LEVELS)
    return steps_tk.to(torch.int8), scale_t1, scale_k


def _divided(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide; the quotient is zero where the scale is zero."""
    return torch.where(scale == 0, 0, values / scale)


# The distance between levels with the least squared error for a normal distribution (Max, "Quantizing for minimum
# distortion", 1960), over its mean magnitude sqrt(2 / pi). The loss is 0.363, 0.119 and 0.012 of the square.
_STEPS = {1: 1.5958 / 0.79788, 2: 0.9957 / 0.79788, 4: 0.3352 / 0.79788}


def quantize_residual(residual_tn: torch.Tensor, bits: int) -> Residual:
    """Quantize `residual_tn` (T, n), which is overwritten. Non-finite values spoil the scales, so they stay visible."""
    scale_t1, scale_n = _scales(residual_tn.abs())
    step_t1 = (_STEPS[bits] * scale_t1).bfloat16()
    steps_tn = residual_tn.mul_(_inverse(scale_n.to(residual_tn.dtype))).mul_(_inverse(step_t1.to(residual_tn.dtype)))
    top = 2**bits - 1
    codes_tn = steps_tn.nan_to_num_(0).add_((top + 1) / 2).clamp_(0, top).to(torch.uint8)  # truncated, not rounded
    columns = -(-residual_tn.shape[1] * bits // 8)
    codes_tn = torch.nn.functional.pad(codes_tn, (0, columns * 8 // bits - residual_tn.shape[1]))
    first, *others = codes_tn.split(columns, dim=1)
    codes_tm = first.clone()
    for place, plane in enumerate(others, start=1):
        codes_tm |= plane << place * bits
    return Residual(codes_tm, step_t1, scale_n, bits)


def _scales(magnitude_tn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean magnitudes: of rows (T, 1) after division by those of columns (n), without empty columns.

    Columns are averaged over rows scaled to equal length, so that a massive row does not set the profile of all others.
    Rows get their scale from columns of equal size, so that a massive column does not blur the rest of its row.
    """
    length_t1 = magnitude_tn.mean(1, keepdim=True, dtype=torch.float32)
    profile_n = (_inverse(length_t1).to(magnitude_tn.dtype).T @ magnitude_tn).squeeze(0).float()
    scale_n = (profile_n / len(magnitude_tn)).bfloat16()
    inverse_n1 = _inverse(scale_n.to(magnitude_tn.dtype)).unsqueeze(1)
    return magnitude_tn @ inverse_n1 / inverse_n1.count_nonzero().clamp_min(1), scale_n


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """Compute 1 / scale, or zero where the scale is zero or negligible."""
    return torch.where(scale.abs() <= torch.finfo(torch.bfloat16).tiny, 0, 1 / scale)
