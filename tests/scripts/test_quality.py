"""The table of anchored training, from results with known shares."""

import pytest

from scripts.quality.anchored import print_anchored
from scripts.quality.tables import with_shares


def test_lines_are_emulators_and_columns_ways(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for seed, plain in ((0, 2.5), (1, 2.3)):
        rows += [
            {"kind": "direct", "size": 1.0, "seed": seed, "row": "original", "loss": 3.0},
            {"kind": "direct", "size": 1.0, "seed": seed, "row": "direct", "loss": 2.0},
            {"kind": "coded", "size": 0.12, "seed": seed, "row": "uncorrected", "loss": plain, "bytes": 25_500_000},
        ]
    anchored = {"kind": "coded+anchor10", "size": 0.12, "seed": 0, "bytes": 25_500_000}
    rows += [
        {**anchored, "row": "uncorrected", "loss": 2.1},
        {**anchored, "row": "uncorrected + 5", "loss": 2.05, "polished": True},
        {**anchored, "kind": "coded+anchor30", "row": "uncorrected", "loss": 2.2},
    ]
    print_anchored(with_shares(rows))
    assert capsys.readouterr().out.splitlines() == [
        "original: 3.0000 nats per token, 2 seeds",
        "direct: 2.0000 nats per token, 2 seeds",
        "",
        "| emulator | bytes MB | plain | every 30 steps | every 10 steps | every 10 steps, 5 exact steps |",
        "|---|---|---|---|---|---|",
        "| coded 0.12 | 25.5 | 60.0 ± 14.1 % | 80.0 % (seeds: 1) | 90.0 % (seeds: 1) | 95.0 % (seeds: 1) |",
    ]
