"""The settings of sample pictures. Torch-free."""

from typing import Annotated, Self, TypedDict

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from onelayer.compiler.errors import InputError
from onelayer.compiler.settings import Must, OnDevice, Option, Resumed, Revised, Seeded, Settings, option_name

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1), Option(flags="--prompt"), Must("say what to draw")]
SampleSteps = Annotated[
    PositiveInt | None, Field(description="Denoising steps of a sample picture; the pipeline's own number by default.")
]
SampleResolution = Annotated[
    Annotated[int, Field(ge=16)] | None,
    Field(description="Sample pictures are squares of this many pixels; the pipeline's own size by default."),
]


class Drawing(Settings):
    """How pictures are drawn, where it is not as their pipeline does it."""

    steps: SampleSteps = None
    resolution: SampleResolution = None


class Pictures(Drawing):
    """Which pictures are drawn, and how."""

    prompts: Prompts


class TrainedPictures(Settings):
    """The pictures that show what a training has learned."""

    sample_prompt: Annotated[
        Prompts | None,
        Field(
            description="Draw a picture of this prompt with the adapter when training ends, by the streamed original; "
            "may be repeated."
        ),
        Option(metavar="TEXT"),
    ] = None
    sample_steps: SampleSteps = Drawing.default("steps")
    sample_resolution: SampleResolution = Drawing.default("resolution")

    @model_validator(mode="after")
    def _of_prompts(self) -> Self:
        for name in ("sample_steps", "sample_resolution"):
            if getattr(self, name) is not None and self.sample_prompt is None:
                raise InputError(f"{option_name(TrainedPictures, name)}: nothing is drawn; give --sample-prompt too")
        return self

    @property
    def pictures(self) -> Pictures | None:
        """The pictures that are asked for."""
        if self.sample_prompt is None:
            return None
        return Pictures(prompts=self.sample_prompt, steps=self.sample_steps, resolution=self.sample_resolution)


class SampleSettings(Seeded, OnDevice, Resumed, Revised, Drawing):
    """What can be set of sample pictures."""


class SampleKeywords(TypedDict, total=False):
    """The keywords of `sample_pictures`."""

    steps: int | None
    resolution: int | None
    seed: int
    device: str | None
    revision: str | None
    resume: bool
