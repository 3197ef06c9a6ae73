"""The settings of noise, torch-free."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from onelayer.compiler.settings import Settings

Weighting = Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"]


class ScoredNoise(Settings):
    """At how many times a held-out image is scored."""

    noise_samples: Annotated[
        PositiveInt,
        Field(description="Encoded images: how many times and noises each is scored at, the same for all adapters."),
    ] = 8


class TrainedNoise(Settings):
    """How times are drawn and losses weighted in training."""

    weighting: Annotated[
        Weighting,
        Field(description="Encoded images: the density of times and the weight of losses, as diffusers names them."),
    ] = "logit_normal"
    prior_weight: Annotated[
        NonNegativeFloat, Field(description="Encoded images: the weight of class images in the loss.")
    ] = 1.0
