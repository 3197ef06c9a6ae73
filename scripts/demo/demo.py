"""Runs the whole method on one model: prepare, run a manifest, print the results as one table.

Run it with `scripts/demo.sh` (or `python -m scripts.demo.demo`). Everything is kept under $ONELAYER_HOME, so a second
run only reads. The model is SmolLM2-135M-Instruct, which also answers a question before and after; or, with --small
and where the package index lacks that model, a small one that is trained first.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline import run
from onelayer.runtime.reporting.tables import table
from onelayer.runtime.sizes import size
from scripts.demo.model import demo_directory
from scripts.demo.smollm2 import answers, smollm2_directory

MANIFESTS = Path(__file__).parents[2] / "manifests"
ROWS = {
    "original": "the original model",
    "uncorrected": "+ adapter trained on the emulator, as is",
    "corrected": "+ the same adapter, corrected",
    "polished": "+ six exact steps on the original, streamed",
    "direct": "+ LoRA trained on the original itself",
}
ANSWERING = {
    "manual.correct": "The original with the adapter trained on its emulator",
    "manual.direct": "The original with LoRA trained on itself",
}


def main() -> int:
    """Run the demo; the exit code is 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="use a model of 7M parameters, trained here first")
    started = time.perf_counter()

    # 1. Take a real model, and a task from the documentation of Python's standard library; or make a small one, trained
    #    on source code, and two kinds of text that it has not seen.
    directory, name = _prepared(real=not parser.parse_args().small)

    # 2. Run one manifest, as a user does: compile the emulator, then train, correct and score each task.
    manifest = load_manifest(shutil.copy(MANIFESTS / name, directory / name))
    result = run.run(manifest, notify=lambda text: tqdm.write(text, file=sys.stderr))
    for step in result.failed:
        print(f"demo: {step.name}: {step.reason}", file=sys.stderr)
    if result.failed:
        return 1

    # 3. Print the results.
    print(losses(result.evaluations))
    print()
    print(costs(result))
    made = {step.name: Path(step.path) for step in result.steps if step.path}
    if (directory / "question.json").exists():
        print()
        print(answers(directory, {title: made[step] for step, title in ANSWERING.items()}))
    print(f"\nThe whole run took {time.perf_counter() - started:.0f} s; results are in {directory}")
    return 0


def _prepared(real: bool) -> tuple[Path, str]:
    """Return the directory with model and data, and the name of its manifest."""
    if real:
        try:
            return smollm2_directory(), "demo-smollm2.yaml"
        except InputError as error:
            print(f"demo: {error}; using a small model, trained here", file=sys.stderr)
    return demo_directory(), "demo.yaml"


def losses(evaluations: dict[str, list[dict[str, Any]]]) -> str:
    """Make a table: held-out loss of every row per task, and its share of the gain of direct training."""
    loss = {task: {row["name"]: row["loss"] for row in rows} for task, rows in evaluations.items()}
    lines: list[list[str]] = [["Held-out loss (nats per token)"]]
    for task in loss:
        lines[0] += [task, "gain"]
    for name in next(iter(loss.values())):
        line = [ROWS[name]]
        for scores in loss.values():
            gain = (scores["original"] - scores[name]) / (scores["original"] - scores["direct"])
            line += [f"{scores[name]:.3f}", f"{gain:.0%}" if name != "original" else ""]
        lines.append(line)
    return table(lines) + "\n(gain: share of what LoRA trained on the original itself gains)"


def costs(result: run.RunResult) -> str:
    """Describe the emulator's size, and the memory of the streamed passes next to the size of one layer."""
    payload = {step.name: Path(step.path) for step in result.steps if step.path}
    emulator = read_json(payload.get("refine", payload["compile"]) / "emulator.json")
    reports = {"compile": emulator["report"]}
    if "refine" in payload:
        reports["refine"] = emulator["refined"]["report"]
    for name, path in payload.items():
        if name.endswith("evaluate"):
            reports[name] = read_json(path / "evaluation.json")["report"]
    lines = [["Memory", "largest unit", "workspace, predicted", "peak, measured"]]
    for name, report in reports.items():
        fields = ("largest_unit_bytes", "workspace_bytes", "peak_device_bytes")
        lines.append([name, *(size(report[field]) for field in fields)])
    settings = emulator["settings"]
    made_of = "codes with nf4 factors" if settings.get("form") == "coded" else f"{settings['factor_dtype']} factors"
    return (
        f"Emulator: {emulator['kept_bytes_share']:.1%} of the bytes that the original's layers take at 16 bits, "
        f"{made_of}\n\n{table(lines)}\n"
        "(peak: how far the process's memory grew while the layers streamed by; the CPU is the device here)"
    )


if __name__ == "__main__":
    sys.exit(main())
