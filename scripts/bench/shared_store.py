"""Runs a manifest of eight tasks in one process, then in two that share the artifacts and have homes of their own.

    python -m scripts.bench.shared_store [--tasks 8] [--steps 10] [--width 256] [--layers 4]

A small random Llama is made for it. Each process has one thread. Prints a line of JSON for each way: wall seconds, the
step-seconds of each process (its processor time) and the number of steps that each executed; all steps of both
processes together are those of the one process, or the script exits with 1.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from scripts.bench.compile import make_model
from scripts.bench.options import parser_of


def write_manifest(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write a model, a file of texts for each task, and the manifest."""
    make_model(folder, arguments.width, arguments.layers, samples=16, tokens=64)
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    tasks: dict[str, Any] = {}
    for number in range(arguments.tasks):
        (folder / f"task{number}.jsonl").write_text("".join(lines[number:] + lines[:number]))
        tasks[f"task{number}"] = {"train": f"task{number}.jsonl"}
    train = {"max_length": 64, "args": {"max_steps": arguments.steps, "per_device_train_batch_size": 4}}
    calibration = {"data": ["data.jsonl"], "samples": 16, "max_length": 64}
    document = {"version": 1, "model": {"path": "model"}, "emulator": {"keep_bytes": 0.25, "calibration": calibration}}
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({**document, "train": train, "tasks": tasks}))
    return path


def run_together(manifest: Path, count: int) -> list[dict[str, Any]]:
    """Run a manifest in `count` processes at once, from an empty store; return what each executed and took."""
    folder = manifest.parent / f"{count} processes"
    (folder / "artifacts").mkdir(parents=True)
    running = []
    for number in range(count):
        home = folder / f"home {number}"
        home.mkdir()
        (home / "artifacts").symlink_to(folder / "artifacts")
        environment = {**os.environ, "ONELAYER_HOME": str(home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "scripts.bench.shared_store", "--child", str(manifest)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


def run_here(manifest: Path) -> None:
    """Run a manifest in this process; print what it executed and its processor time."""
    from onelayer.runtime.manifest.manifest import load_manifest
    from onelayer.runtime.pipeline.run import run

    result = run(load_manifest(manifest))
    used = resource.getrusage(resource.RUSAGE_SELF)
    executed = [step.name for step in result.steps if step.state == "ran"]
    print(json.dumps({"executed": executed, "step_seconds": round(used.ru_utime + used.ru_stime, 1)}))


def main() -> int:
    """Run both ways and compare."""
    parser = parser_of(__doc__, tasks=8, steps=10, width=256, layers=4)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_here(arguments.child)
        return 0
    executed = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), arguments)
        for count in (1, 2):
            start = time.perf_counter()
            found = run_together(manifest, count)
            executed.append(sorted(name for process in found for name in process["executed"]))
            line = {"processes": count, "seconds": round(time.perf_counter() - start, 1)}
            steps = {"steps": [len(process["executed"]) for process in found]}
            print(json.dumps(line | steps | {"step_seconds": [process["step_seconds"] for process in found]}))
    return int(executed[0] != executed[1])


if __name__ == "__main__":
    sys.exit(main())
