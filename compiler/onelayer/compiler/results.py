"""What commands return: documents that a program can read, and the figures of a streamed pass."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    pass


class Result(BaseModel):
    """What a command returns; `model_dump(mode="json")` is its `--json` document."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Report(Result):
    """The figures that every streamed command ends with, all measured but `workspace_bytes`, which is predicted.

    On a GPU `peak_device_bytes` is what its allocator handed out at most; on a CPU it is how far the process's
    anonymous memory grew during the pass. `peak_host_bytes` is the anonymous memory of the whole process at its peak.
    """

    largest_unit_bytes: int
    workspace_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    seconds: float


def round_significant(value: float, digits: int) -> float:
    """Round a value to so many significant digits."""
    return float(f"{value:.{digits}g}")
