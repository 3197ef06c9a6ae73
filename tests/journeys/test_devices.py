"""The journeys on a pretend accelerator, each file in a process of its own.

A process that has computed gradients cannot register another device, and one that has registered it offers it to all.
"""

import os
import subprocess
import sys

import pytest

from helpers.places import ROOT


@pytest.mark.parametrize("name", ["pretend_commands", "pretend_costs", "pretend_promises"])
def test_on_a_pretend_device(name: str) -> None:
    file = ROOT / "tests" / "journeys" / f"{name}.py"
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
