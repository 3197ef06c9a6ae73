"""The results of commands: documents that a program can read, and the figures of a streamed pass."""

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """The result of a command; `model_dump(mode="json")` is its `--json` document."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")


class Report(Result):
    """The figures of every streamed command. All are measured, except `workspace_bytes`, which is predicted.

    On a GPU, `peak_device_bytes` is the most that its allocator handed out, and `reserved_device_bytes` the most that
    it held of the device, with what it kept between uses (None on a CPU). On a CPU, it is the growth of the process's
    anonymous memory during the pass. `peak_host_bytes` is the anonymous memory of the whole process at its peak.
    """

    largest_unit_bytes: int
    workspace_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    bytes_read: int
    seconds: float
    reserved_device_bytes: int | None = None


def round_significant(value: float, digits: int) -> float:
    """Round a value to `digits` significant digits."""
    return float(f"{value:.{digits}g}")
