"""Checks every streamed pass on a GPU against the CPU, and its peak against its promise; prints tables of both.

    scripts/gpu.sh [--device cuda] [--tiny] [--output TABLE.md]

Exits with 1 if a result differs from the CPU's or a peak is above its promise. Of a pass that did not start within the
time limit the table says so.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.devices import PRETEND, opened
from scripts.gpu.passes import SHAPED_8B, TINY, Pass, make_files, passes

# On a GPU sums have another order, and a correction's or a step's figures follow from many of them.
TOLERANCE = 2e-3
LIMIT_SECONDS = 8 * 60
HEAD = ("pass", "seconds", "peak", "promised", "reserved", "kept")


Row = tuple[str, dict[str, Any] | None]


def compared(path: Path, device: torch.device) -> tuple[list[tuple[str, float]], list[Row]]:
    """Run every pass on a tiny model on the CPU and on the device.

    Returns the largest relative difference of each, and the reports of the device.
    """
    make_files(path, TINY, device)
    found: dict[str, dict[str, tuple[list[float], dict[str, Any]]]] = {}
    for name in ("cpu", device.type):
        with_trainer_on(name)
        found[name] = {title: timed(run) for title, run in passes(path, TINY, name).items()}
    differences = [
        (title, max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(wanted, found[device.type][title][0], strict=True)))
        for title, (wanted, _) in found["cpu"].items()
    ]
    return differences, [(title, report) for title, (_, report) in found[device.type].items()]


def timed(run: Pass) -> tuple[list[float], dict[str, Any]]:
    """Run a pass; return its figures, and its report with its seconds."""
    begun = time.monotonic()
    figures, report = run()
    return figures, {**report, "seconds": time.monotonic() - begun}


def measured(path: Path, device: torch.device, started: float) -> list[Row]:
    """Run every pass once on the large shape; return its report, None if there was no time left."""
    make_files(path, SHAPED_8B, device)
    return [
        (title, None if time.monotonic() - started > LIMIT_SECONDS else timed(run)[1])
        for title, run in passes(path, SHAPED_8B, device.type).items()
    ]


def with_trainer_on(name: str) -> None:
    """Let Trainer, which knows real devices only, take the pretend one."""
    if PRETEND in torch._C._get_privateuse1_backend_name():
        import pytest

        from helpers.pretend_trainer import let_trainer_use  # type: ignore[import-not-found, unused-ignore]

        let_trainer_use(name, pytest.MonkeyPatch())


def row_of(title: str, report: dict[str, Any] | None) -> tuple[str, ...]:
    """Format one measured pass."""
    if report is None:
        return (title, "no time left", "", "", "", "")
    promised = report.get("largest_unit_bytes", 0) + report.get("workspace_bytes", 0)
    sizes = (report["peak_device_bytes"], promised, report.get("reserved_device_bytes"))
    kept = "yes" if not promised or sizes[0] <= promised else "NO"
    return (title, f"{report['seconds']:.1f}", *(f"{size / 1e6:.0f} MB" if size else "" for size in sizes), kept)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table, the first as its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def main() -> int:
    """Check, measure, print; return 1 if something differs or a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or pretend for a dry run")
    parser.add_argument("--tiny", action="store_true", help="leave out the layers of an 8B model")
    parser.add_argument("--output", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    started, device = time.monotonic(), opened(arguments.device)
    name = torch.get_device_module(device).get_device_name()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        differences, reports = compared(Path(one), device)
        if not arguments.tiny:
            reports = measured(Path(other), device, started)
    rows = [row_of(*row) for row in reports]
    text = "\n\n".join(
        [
            f"{name}, torch {torch.__version__}, {time.monotonic() - started:.0f} s in all",
            markdown([("pass", "largest difference from the CPU"), *((n, f"{size:.0e}") for n, size in differences)]),
            markdown([HEAD, *rows]),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(any(size > TOLERANCE for _, size in differences) or any(row[-1] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
