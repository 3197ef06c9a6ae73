"""The GPU script, on the pretend device: every pass runs, results are the CPU's, promises are kept."""

import subprocess

import pytest

from helpers.places import ROOT


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu() -> None:
    command = [str(ROOT / "scripts" / "gpu.sh"), "--device", "pretend", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    differences, measured = done.stdout.split("| pass | ")[1:]
    assert differences.count("\n| ") == measured.count("\n| ") == 8
    assert measured.count("| yes |") == 7
