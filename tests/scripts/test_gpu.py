"""The GPU script, on the pretend device: every pass runs, results are the CPU's, promises are kept."""

import subprocess
import time
from pathlib import Path

import pytest
import torch

from helpers.places import ROOT
from scripts.gpu import check
from scripts.gpu.passes import SHAPED_8B, passes


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu() -> None:
    command = [str(ROOT / "scripts" / "gpu.sh"), "--device", "pretend", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    differences, measured = done.stdout.split("| pass | ")[1:]
    assert differences.count("\n| ") == measured.count("\n| ") == 8
    assert measured.count("| yes |") == 7


def test_passes_for_which_no_time_is_left_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no time is left for any, so that the large shape costs nothing."""
    made = []
    monkeypatch.setattr(check, "make_files", lambda path, shape, device: made.append(shape))
    rows = check.measured(tmp_path, torch.device("cpu"), time.monotonic() - check.LIMIT_SECONDS - 1)
    table = check.markdown([check.HEAD, *(check.row_of(*row) for row in rows)])
    assert made == [SHAPED_8B]
    assert [title for title, _ in rows] == [*passes(tmp_path, SHAPED_8B, "cpu")]
    assert table.count("| no time left | ") == 7
    assert {line.count("|") for line in table.splitlines()} == {len(check.HEAD) + 1}
