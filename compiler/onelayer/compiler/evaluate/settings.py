"""The settings of an evaluation."""

from typing import TypedDict

from onelayer.compiler.denoising.settings import ScoredNoise
from onelayer.compiler.settings import Batched, Lengths, Machine, Revised


class EvaluateSettings(ScoredNoise, Lengths, Batched, Machine, Revised):
    """What can be set of an evaluation."""


class EvaluateKeywords(TypedDict, total=False):
    """The keywords of `evaluate_model`."""

    max_length: int
    max_image_pixels: int | None
    batch_size: int
    noise_samples: int
    device: str | None
    revision: str | None
    host_memory_bytes: int | None
