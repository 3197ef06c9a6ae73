"""Documents on what compressing activations saves and costs; torch-free, since results of training hold them."""

from onelayer.compiler.results import Result


class LayerFigures(Result):
    """One layer, or one norm of it: how it is recomputed, and relative Frobenius error and rank of what is stored.

    `fallback` says why a layer is recomputed whole although sub-layers were requested. A rank of None is a tensor that
    is kept exactly.
    """

    name: str
    where: str
    errors: list[float]
    ranks: list[int | None]
    fallback: str | None


class ActivationReport(Result):
    """Compression as measured on one batch.

    `saved_bytes` is what is kept for the backward pass, by category. `residual_bits` are the bits of each value's
    residual. `gradient_cosine` is the cosine with the exact gradient, each taken as one vector over all trained
    parameters; like the errors, it is present only if it was requested.
    """

    where: str
    rank: int | float | None
    residual_bits: int
    saved_bytes: dict[str, int]
    gradient_cosine: float | None
    layers: list[LayerFigures]
