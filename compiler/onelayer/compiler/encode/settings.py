"""The settings of an encoding."""

from typing import Annotated, TypedDict

from pydantic import Field, PositiveFloat

from onelayer.compiler.settings import OnDevice, Option, Resumed, Revised, Seeded, Settings


class EncodedPictures(Settings):
    """The size of pictures, and the captions of those without one of their own."""

    resolution: Annotated[
        int, Field(ge=16, description="Images are scaled and cropped to squares of this many pixels.")
    ] = 512
    instance_prompt: Annotated[
        str | None,
        Field(description="Caption of images without one of their own, like 'a photo of sks dog'."),
        Option(metavar="TEXT"),
    ] = None
    class_prompt: Annotated[
        str | None,
        Field(description="Caption of class images without one of their own, like 'a photo of a dog'."),
        Option(metavar="TEXT"),
    ] = None
    guidance: Annotated[
        PositiveFloat | None,
        Field(description="Guidance that a guidance-distilled denoiser gets as an argument; 1 by default."),
    ] = None


class EncodeSettings(Seeded, OnDevice, Resumed, Revised, EncodedPictures):
    """What can be set of an encoding."""


class EncodeKeywords(TypedDict, total=False):
    """The keywords of `encode_images`."""

    resolution: int
    instance_prompt: str | None
    class_prompt: str | None
    guidance: float | None
    seed: int
    device: str | None
    revision: str | None
    resume: bool
