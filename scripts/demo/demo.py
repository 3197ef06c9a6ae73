"""Runs the whole method on a small model: prepare, run a manifest, print the results as one table.

Run it with `scripts/demo.sh` (or `python -m scripts.demo.demo`). Everything is kept under $ONELAYER_HOME, so a second
run only reads.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onelayer.compiler.storage.files import read_json
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline import run
from onelayer.runtime.reporting.tables import table
from onelayer.runtime.sizes import size
from scripts.demo.model import demo_directory

MANIFEST = Path(__file__).parents[2] / "manifests" / "demo.yaml"
ROWS = {
    "original": "the original model",
    "uncorrected": "+ adapter trained on the emulator, as is",
    "corrected": "+ the same adapter, corrected",
    "polished": "+ six exact steps on the original, streamed",
    "direct": "+ LoRA trained on the original itself",
}


def main() -> int:
    """Run the demo; the exit code is 1 if a step failed."""
    started = time.perf_counter()

    # 1. Make a small language model, trained on source code, and two kinds of text that it has not seen.
    directory = demo_directory()

    # 2. Run one manifest, as a user does. Compile the emulator and refine it; then train, correct, polish and score
    #    each task.
    manifest = load_manifest(shutil.copy(MANIFEST, directory / MANIFEST.name))
    result = run.run(manifest, notify=lambda text: tqdm.write(text, file=sys.stderr))
    for step in result.failed:
        print(f"demo: {step.name}: {step.reason}", file=sys.stderr)
    if result.failed:
        return 1

    # 3. Print the results.
    print(losses(result.evaluations))
    print()
    print(costs(result))
    print(f"\nThe whole run took {time.perf_counter() - started:.0f} s; results are in {directory}")
    return 0


def losses(evaluations: dict[str, list[dict[str, Any]]]) -> str:
    """Make a table: held-out loss of every row per task, and its share of the gain of direct training."""
    loss = {task: {row["name"]: row["loss"] for row in rows} for task, rows in evaluations.items()}
    lines: list[list[str]] = [["Held-out loss (nats per token)"]]
    for task in loss:
        lines[0] += [task, "gain"]
    for name, title in ROWS.items():
        line = [title]
        for scores in loss.values():
            gain = (scores["original"] - scores[name]) / (scores["original"] - scores["direct"])
            line += [f"{scores[name]:.3f}", f"{gain:.0%}" if name != "original" else ""]
        lines.append(line)
    return table(lines) + "\n(gain: share of what LoRA trained on the original itself gains)"


def costs(result: run.RunResult) -> str:
    """Describe the emulator's size, and the memory of the streamed passes next to the size of one layer."""
    payload = {step.name: Path(step.path) for step in result.steps if step.path}
    emulator = read_json(payload["refine"] / "emulator.json")
    reports = {"compile": emulator["report"], "refine": emulator["refined"]["report"]}
    for name, path in payload.items():
        if name.endswith("evaluate"):
            reports[name] = read_json(path / "evaluation.json")["report"]
    lines = [["Memory", "largest unit", "workspace, predicted", "peak, measured"]]
    for name, report in reports.items():
        fields = ("largest_unit_bytes", "workspace_bytes", "peak_device_bytes")
        lines.append([name, *(size(report[field]) for field in fields)])
    return (
        f"Emulator: {emulator['kept_bytes_share']:.1%} of the bytes that the original's layers take at 16 bits, "
        f"{emulator['settings']['factor_dtype']} factors\n\n{table(lines)}\n"
        "(peak: how far the process's memory grew while the layers streamed by; the CPU is the device here)"
    )


if __name__ == "__main__":
    sys.exit(main())
