"""The settings of a streamed model. Torch-free."""

from typing import Annotated, TypedDict

from pydantic import Field, NonNegativeInt, PositiveInt

from onelayer.compiler.settings import Machine, Option, Revised


class Streaming(Machine):
    """How much of a batch is computed at once, and how much of the model stays in host memory."""

    micro_batch_size: Annotated[
        PositiveInt | None, Field(description="Rows computed at once. Default: as many as fit the free memory.")
    ] = None
    cache_bytes: Annotated[
        NonNegativeInt,
        Field(description="Host memory for the last layers, which are then read once and not twice a step."),
        Option(flags="--cache", metavar="SIZE", reader="bytes"),
    ] = 0


class StreamedSettings(Streaming, Revised):
    """What can be set of a streamed model."""


class StreamedKeywords(TypedDict, total=False):
    """The keywords of `streamed_for_training`."""

    micro_batch_size: int | None
    cache_bytes: int
    device: str | None
    host_memory_bytes: int | None
    revision: str | None
