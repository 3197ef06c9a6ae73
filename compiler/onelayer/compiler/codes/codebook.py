"""The codebook that every coded linear starts from: the best one for normally distributed values. Pure."""

from functools import lru_cache

import numpy as np
import torch

from onelayer.compiler.codes.forms import CODEBOOK_ROWS, CodeWidth

SAMPLES, ROUNDS, SEED = 40_000, 15, 0


@lru_cache
def normal_codebook(width: CodeWidth) -> torch.Tensor:
    """Return the codebook (256, width) in float32, rounded to bfloat16, for values of mean 0 and variance 1.

    Weights in units of their row's root mean square are close to normal. A codebook fitted to each linear gained
    nothing before refinement (manifests/LOG.md, codes with a low-rank part).
    """
    from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]  # half a second that only codes need

    generator = np.random.default_rng(SEED)
    samples = generator.standard_normal((SAMPLES, width))
    centers, _ = kmeans2(samples, CODEBOOK_ROWS, iter=ROUNDS, minit="points", seed=generator)
    return torch.from_numpy(centers).to(torch.bfloat16).to(torch.float32)
