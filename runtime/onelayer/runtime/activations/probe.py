"""A batch's loss and a compressed model in; the closeness of its gradient to the exact one and a sufficient rank out.

Nothing is trained here: gradients are computed and compared, and the global random state is restored.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from onelayer.compiler.machine.devices import forked_random
from onelayer.runtime.activations.compression import ActivationCompression, Rank
from onelayer.runtime.activations.figures import Figures
from onelayer.runtime.activations.report import ActivationReport, LayerFigures

logger = logging.getLogger("onelayer")

# `auto` takes the first of these shares of the hidden size with which the gradient's cosine with the exact one reaches
# the threshold. Two batches of a fine-tuning agree far less (0.4 to 0.5, see manifests/LOG.md).
AUTO_COSINE = 0.99
AUTO_SHARES: tuple[Rank, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

Loss = Callable[[], torch.Tensor]


def gradients(parameters: Sequence[nn.Parameter], loss: Loss) -> list[torch.Tensor]:
    """Return the gradient of each parameter, zeros if the loss does not depend on it; dropout as in the next step."""
    with forked_random(), torch.enable_grad():
        computed = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, computed, strict=True)
    ]


def cosine(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Return the cosine of the angle between two gradients, each taken as one vector."""
    inner = sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))
    sizes = [sum(float(tensor.double().square().sum()) for tensor in side) for side in (left, right)]
    return inner / (sizes[0] * sizes[1]) ** 0.5 if all(sizes) else float(sizes[0] == sizes[1])


def choose_rank(
    compression: ActivationCompression, parameters: Sequence[nn.Parameter], loss: Loss, threshold: float = AUTO_COSINE
) -> Rank | None:
    """Set and return the smallest share of `AUTO_SHARES` that reaches the threshold; None (exact) if none does."""
    with compression.exact():
        exact = gradients(parameters, loss)
    for share in AUTO_SHARES:
        compression.rank = share
        if cosine(exact, gradients(parameters, loss)) >= threshold:
            return share
    compression.rank = None
    logger.warning(
        "no rank keeps a gradient cosine of %s on the first batch, so activations are kept exactly", threshold
    )
    return None


def gradient_report(
    compression: ActivationCompression, parameters: Sequence[nn.Parameter], loss: Loss
) -> ActivationReport:
    """Compare the compressed gradient of a batch with the exact one, and report what is stored."""
    with compression.exact():
        exact = gradients(parameters, loss)
    with compression.measure() as figures:
        approximate = gradients(parameters, loss)
    return report(compression, figures, cosine(exact, approximate))


def report(compression: ActivationCompression, figures: Figures, gradient_cosine: float | None) -> ActivationReport:
    """Return the figures of a forward pass as a document."""
    return ActivationReport(
        where=compression.where,
        rank=compression.rank,
        residual_bits=compression.residual_bits,
        saved_bytes=dict(figures.saved_bytes),
        gradient_cosine=gradient_cosine,
        layers=list(_layers(compression, figures)),
    )


def _layers(compression: ActivationCompression, figures: Figures) -> Iterator[LayerFigures]:
    for name, ranks in figures.ranks.items():
        fallback = compression.fallbacks.get(name)
        where = "layer" if compression.where == "layer" or fallback is not None else "sublayer"
        yield LayerFigures(name=name, where=where, ranks=ranks, errors=figures.errors.get(name, []), fallback=fallback)
