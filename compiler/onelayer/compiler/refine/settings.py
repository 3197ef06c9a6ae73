"""The settings of a refinement."""

from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from onelayer.compiler.errors import InputError
from onelayer.compiler.settings import Batched, Lengths, Must, Option, Resumable, Samples, Seeded

# Whose activations a layer learns from; its targets are the original's outputs for the original's inputs.
Inputs = Literal["original", "emulator"]


class FactorTraining(Batched):
    """The settings of factor training: `steps` for each unit, and a learning rate relative to a factor's size."""

    samples: Samples = 256
    steps: Annotated[PositiveInt, Field(description="Training steps for each layer.")] = 100
    step_samples: Annotated[PositiveInt, Field(description="Calibration examples per step.")] = 8
    learning_rate: Annotated[
        PositiveFloat,
        Field(description="Initial learning rate, as a share of a factor's size."),
        Must("be above 0, for example 0.01"),
    ] = 0.01
    backward: Annotated[
        bool, Field(description="Also learn the gradients that flow back, by a pass back over the calibration data.")
    ] = False

    inputs: Annotated[
        Inputs | None,
        Field(description="Inputs that each layer learns from: the original's, or the refined emulator's own."),
        Option(default="the emulator's with codes"),
    ] = None

    def recorded(self, *without: str) -> dict[str, Any]:
        """Leave out what older records do not have and a run may lack: they stay valid."""
        absent = (() if self.backward else ("backward",)) + (() if self.inputs == "emulator" else ("inputs",))
        return super().recorded(*without, *absent)


class RefineSettings(FactorTraining, Lengths, Seeded, Resumable):
    """All settings of a refinement."""

    @model_validator(mode="after")
    def _gradients_are_the_originals(self) -> Self:
        if self.backward and self.inputs == "emulator":
            raise InputError("--inputs emulator: gradients are known for the original's inputs alone; leave one out")
        return self

    def resolved(self, *, coded: bool) -> "RefineSettings":
        """Fill in what the emulator's form decides."""
        chosen = self.inputs or ("emulator" if coded and not self.backward else "original")
        return self.model_copy(update={"inputs": chosen})


class RefineKeywords(TypedDict, total=False):
    """The keywords of `refine_emulator`."""

    steps: int
    step_samples: int
    learning_rate: float
    backward: bool
    inputs: Inputs | None
    samples: int
    max_length: int
    max_image_pixels: int | None
    batch_size: int
    device: str | None
    host_memory_bytes: int | None
    seed: int
    resume: bool
