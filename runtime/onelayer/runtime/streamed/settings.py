"""The settings of a streamed model. Torch-free."""

from typing import Annotated, Literal, TypedDict

from pydantic import Field, NonNegativeInt, PositiveInt

from onelayer.compiler.settings import Machine, Option, Revised, Settings

Way = Literal["auto", "resident", "streamed"]


class Streaming(Settings):
    """How much of a batch is computed at once, and how much of the model stays in host memory."""

    micro_batch_size: Annotated[
        PositiveInt | None,
        Field(
            description="Rows of a streamed model, or images of a denoiser, computed at once. Default: as many rows as "
            "fit the free memory, and one image."
        ),
    ] = None
    cache_bytes: Annotated[
        NonNegativeInt,
        Field(description="Host memory for the last layers of a streamed model, which are then read only once."),
        Option(flags="--cache", metavar="SIZE", reader="bytes"),
    ] = 0


class Holding(Streaming):
    """How a model is held while it is trained."""

    way: Annotated[
        Way,
        Field(
            description="Hold the model in memory (resident), or read it layer by layer in every step (streamed). auto "
            "streams what does not fit."
        ),
        Option(metavar="auto|resident|streamed"),
    ] = "auto"


class StreamedSettings(Streaming, Machine, Revised):
    """What can be set of a streamed model."""


class StreamedKeywords(TypedDict, total=False):
    """The keywords of `streamed_for_training`."""

    micro_batch_size: int | None
    cache_bytes: int
    device: str | None
    host_memory_bytes: int | None
    revision: str | None
