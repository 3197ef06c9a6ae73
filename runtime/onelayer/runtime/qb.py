"""One matrix of activations in, two thin factors out: the sampled orthogonal decomposition, pure numerics.

Shapes: T tokens (rows), n features (columns), k the rank, A (T, n) the activations. LoRAct (arXiv 2509.23472) sketches A
with some of its own rows. What differs here is measured in manifests/LOG.md: rows are drawn by their norm, so that a
massive one is not missed; the sample is orthonormalised before it meets A, so that singular values are not squared
in the precision of A; rows of padding are left out altogether.
"""

from dataclasses import dataclass

import torch

# Others (8-bit floats, integers) are kept as they are: they are small already, or no activations.
FACTORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Kept:
    """A tensor that is stored as it is, since factors would not be smaller."""

    tensor: torch.Tensor

    @property
    def saved_bytes(self) -> int:
        """What is stored."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def rank(self) -> int | None:
        """None: not factored."""
        return None

    def rebuild(self) -> torch.Tensor:
        """The tensor itself, as a new leaf."""
        return self.tensor.detach()


@dataclass(frozen=True)
class Factors:
    """A as `left_tk @ right_kn`. `tokens` are the rows that `left_tk` stands for, None for all; the others are zero."""

    left_tk: torch.Tensor
    right_kn: torch.Tensor
    tokens: torch.Tensor | None
    shape: torch.Size

    @property
    def saved_bytes(self) -> int:
        """What is stored; `tokens` is one list for all layers and counted by who made it."""
        return sum(factor.numel() * factor.element_size() for factor in (self.left_tk, self.right_kn))

    @property
    def rank(self) -> int | None:
        """k."""
        return self.right_kn.shape[0]

    def rebuild(self) -> torch.Tensor:
        """The approximation, in the shape and precision of the tensor it stands for."""
        with torch.autocast(self.left_tk.device.type, enabled=False):
            product_tn = self.left_tk @ self.right_kn
        if self.tokens is not None:
            rows = self.shape.numel() // self.shape[-1]
            product_tn = product_tn.new_zeros(rows, self.shape[-1]).index_copy_(0, self.tokens, product_tn)
        return product_tn.reshape(self.shape)


Compressed = Kept | Factors


@torch.no_grad()
def compress(
    tensor: torch.Tensor, rank: int | None, generator: torch.Generator, tokens: torch.Tensor | None = None
) -> Compressed:
    """Factor `tensor` (..., n) to rank `rank`, or keep it: where None is asked for, or factors are not smaller.

    `tokens` (of int64, over the flattened leading dimensions) are the rows that matter. Rows beside them are padding,
    carry no weight and come back as zeros; as long as the tensor is factored at all.
    """
    features = tensor.shape[-1]
    if rank is None or tensor.dtype not in FACTORED_DTYPES or tensor.ndim < 2 or tensor.numel() == 0:
        return Kept(tensor.detach())
    rows = len(tokens) if tokens is not None else tensor.numel() // features
    if rows <= rank or rank * (rows + features) >= tensor.numel():
        return Kept(tensor.detach())
    activations_tn = tensor.detach().reshape(-1, features)
    if tokens is not None:
        activations_tn = activations_tn.index_select(0, tokens)
    left_tk, right_kn = qb(activations_tn, rank, generator)
    return Factors(left_tk, right_kn, tokens, tensor.shape)


def qb(
    activations_tn: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q (T, k) and B (k, n) with A close to Q B; Q's columns are orthogonal and of length sqrt(T).

    Q spans A A_S^T, A_S the sampled rows: the best approximation of A within that span. A number that is not finite in
    A leaves numbers that are not finite in the result. The length keeps both factors near the size of A, within the
    range of float16.
    """
    # A product in float16 overflows where A itself does not.
    work = torch.float32 if activations_tn.dtype == torch.float16 else activations_tn.dtype
    exact = torch.float64 if work == torch.float64 else torch.float32
    with torch.autocast(activations_tn.device.type, enabled=False):
        a_tn = activations_tn.to(work)
        sample_kn = a_tn.index_select(0, sample_rows(a_tn, rank, generator))
        basis_nk = torch.linalg.qr(sample_kn.T.to(exact)).Q
        q_tk = torch.linalg.qr((a_tn @ basis_nk.to(work)).to(exact)).Q
        length = a_tn.shape[0] ** 0.5
        b_kn = q_tk.to(work).T @ a_tn / length
        return (q_tk * length).to(activations_tn.dtype), b_kn.to(activations_tn.dtype)


def sample_rows(activations_tn: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `count` different rows, drawn with probabilities as their squared norms (Efraimidis and Spirakis).

    A row far longer than the others is as good as certain to be among them.
    """
    norms_t = torch.linalg.vector_norm(activations_tn.float(), dim=1)
    noise_t = torch.empty_like(norms_t).exponential_(generator=generator)
    # Logarithms of norm^2 / noise, since squares leave float32's range.
    return (2 * norms_t.log() - noise_t.log()).topk(count, sorted=False).indices
