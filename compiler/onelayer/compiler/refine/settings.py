"""The settings of a refinement."""

from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from onelayer.compiler.errors import InputError
from onelayer.compiler.settings import Batched, Lengths, Must, Option, Resumable, Samples, Seeded

# Whose activations a layer learns from; its targets are the original's outputs for the original's inputs.
Inputs = Literal["original", "emulator"]
# The first learning rates of factors, and of codebooks, scales and residual factors (manifests/LOG.md, codes refined on
# their own inputs).
FACTOR_RATE, CODE_RATE = 0.01, 0.03


class FactorTraining(Batched):
    """The settings of factor training: `steps` for each unit, and a learning rate relative to a factor's size."""

    samples: Samples = 256
    steps: Annotated[PositiveInt, Field(description="Training steps for each layer.")] = 100
    step_samples: Annotated[PositiveInt, Field(description="Calibration examples per step.")] = 8
    learning_rate: Annotated[
        PositiveFloat | None,
        Field(description="Initial learning rate, as a share of a factor's size."),
        Option(default=f"{FACTOR_RATE}, {CODE_RATE} with codes"),
        Must("be above 0, for example 0.01"),
    ] = None
    backward: Annotated[
        bool, Field(description="Also learn the gradients that flow back, by a pass back over the calibration data.")
    ] = False
    inputs: Annotated[
        Inputs | None,
        Field(description="Inputs that each layer learns from: the original's, or the refined emulator's own."),
        Option(default="the emulator's with codes"),
    ] = None

    @model_validator(mode="after")
    def _gradients_are_the_originals(self) -> Self:
        if self.backward and self.inputs == "emulator":
            raise InputError("--inputs emulator: gradients are known for the original's inputs alone; leave one out")
        return self

    def recorded(self, *without: str) -> dict[str, Any]:
        """Leave out what older records lack and a run may lack too, and name the rate of factors: they stay valid."""
        absent = (() if self.backward else ("backward",)) + (() if self.inputs == "emulator" else ("inputs",))
        return {**super().recorded(*without, *absent), "learning_rate": self.learning_rate or FACTOR_RATE}


class RefineSettings(FactorTraining, Lengths, Seeded, Resumable):
    """All settings of a refinement."""

    def resolved(self, *, coded: bool) -> "ResolvedRefineSettings":
        """Fill in what the emulator's form decides."""
        inputs = self.inputs or ("emulator" if coded and not self.backward else "original")
        rate = self.learning_rate or (CODE_RATE if coded else FACTOR_RATE)
        return ResolvedRefineSettings.of({**dict(self), "inputs": inputs, "learning_rate": rate})


class ResolvedRefineSettings(RefineSettings):
    """The settings of a refinement whose emulator is known."""

    learning_rate: PositiveFloat
    inputs: Inputs


class RefineKeywords(TypedDict, total=False):
    """The keywords of `refine_emulator`."""

    steps: int
    step_samples: int
    learning_rate: float | None
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
