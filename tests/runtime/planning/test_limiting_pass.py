"""The pass that a plan names as what limits it."""

import pytest

from helpers.model_shapes import decoder
from onelayer.runtime.planning.choice import USABLE_SHARE, best_ratio, limiting_pass
from onelayer.runtime.planning.pass_memory import pass_bytes
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, train_memory

LARGE = decoder(4096, 14336, 32, 128256)


@pytest.mark.parametrize(
    ("planned", "expected"),
    [
        (PlannedRun(batch_size=16, max_length=2048, refine_tokens=0), "train"),
        (PlannedRun(batch_size=1, max_length=256, refine_tokens=0, compile_tokens=1 << 17), "compile"),
        (PlannedRun(batch_size=1, max_length=256, refine_tokens=1 << 17), "refine"),
        (PlannedRun(batch_size=16, max_length=2048, refine_tokens=1 << 20), "refine"),
    ],
)
def test_of_several_passes_that_do_not_fit_the_larger_is_named(planned: PlannedRun, expected: str) -> None:
    peaks = {
        **pass_bytes(LARGE, 0.01, planned),
        "train": train_memory(LARGE, emulator_bytes(LARGE, 0.01), planned).peak,
    }
    assert max(peaks, key=lambda name: peaks[name]) == expected
    # Even the second largest does not fit.
    too_little = int(sorted(peaks.values())[-2] / USABLE_SHARE) - (64 << 20)
    choice = best_ratio(LARGE, planned, too_little)
    assert choice.ratio is None
    assert limiting_pass(LARGE, choice, too_little).startswith(f"{expected}: ")
