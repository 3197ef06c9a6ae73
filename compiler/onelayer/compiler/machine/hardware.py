"""What the machine has, as far as it shows without torch: for predictions, not for computing."""

from pathlib import Path

# The device files of the drivers of Nvidia, of AMD, and of GPUs inside WSL.
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))


def shows_gpu() -> bool:
    """Return whether a driver for a GPU that torch can use is loaded."""
    return any(driver.exists() for driver in _DRIVERS)
