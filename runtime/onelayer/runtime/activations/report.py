"""What compressing activations saves and costs, as documents; torch-free, since results of training hold them."""

from onelayer.compiler.results import Result


class LayerFigures(Result):
    """One layer, or one norm of it: how it is recomputed, and relative Frobenius error and rank of what is stored.

    `fallback` says why a layer is recomputed as a whole where sub-layers were asked for. A rank of None is a tensor
    kept as it is.
    """

    name: str
    where: str
    errors: list[float]
    ranks: list[int | None]
    fallback: str | None


class ActivationReport(Result):
    """Compression as measured on one batch.

    `saved_bytes` is what is kept for the backward pass, by category; `residual_bits` are those of each value beside its
    factors. `gradient_cosine` is that with the exact gradient,
    all trained parameters taken as one vector; like the errors, it is known where it was asked for.
    """

    where: str
    rank: int | float | None
    residual_bits: int
    saved_bytes: dict[str, int]
    gradient_cosine: float | None
    layers: list[LayerFigures]
