"""The device that a script computes on: a real one, or the tests' pretend accelerator, which needs no hardware."""

import sys
from pathlib import Path

import torch

CPU = torch.device("cpu")
PRETEND = "pretend"
TESTS = Path(__file__).resolve().parents[1] / "tests"


def opened(name: str) -> torch.device:
    """Return a device that is ready. The pretend one must be opened before the process computes a gradient."""
    if name == PRETEND:
        import pytest

        sys.path.append(str(TESTS))
        from helpers import pretend_device

        pretend_device.patch(pytest.MonkeyPatch())
        torch.backends.cuda.enable_flash_sdp(False)  # so that the host takes the same arithmetic
    return torch.device(name)
