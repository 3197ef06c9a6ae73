"""The settings of a refinement."""

from typing import Annotated, Any, TypedDict

from pydantic import Field, PositiveFloat, PositiveInt

from onelayer.compiler.settings import Batched, Lengths, Must, Resumable, Samples, Seeded


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

    def recorded(self, *without: str) -> dict[str, Any]:
        """Leave out the backward pass where there is none: older records stay valid."""
        return super().recorded(*without, *(() if self.backward else ("backward",)))


class RefineSettings(FactorTraining, Lengths, Seeded, Resumable):
    """All settings of a refinement."""


class RefineKeywords(TypedDict, total=False):
    """The keywords of `refine_emulator`."""

    steps: int
    step_samples: int
    learning_rate: float
    backward: bool
    samples: int
    max_length: int
    batch_size: int
    device: str | None
    host_memory_bytes: int | None
    seed: int
    resume: bool
