"""Starts real `torchrun` with two processes for every fault, and checks how the run ends.

    python -m scripts.torchrun [--only "killed compile"]

Prints a line of JSON for each fault: the exit code, the seconds from the fault to the end of torchrun, our lines and
how many lines are torchrun's own. Exits with 1 unless each run ends within ten seconds of its fault, with a code other
than 0, one line of ours, no traceback of ours, and nothing half-written next to what the next run takes up.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from scripts.gpu.passes import Shape, make_files

LIMIT_SECONDS = 10.0
# A run that is not struck by its fault within this time is killed.
MOST_SECONDS = 120.0
LAYERS = 32  # so many that a run is still at work when its first layer is found finished
SHAPE = Shape(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "float32",
    rows=16,
    tokens=8,
    refine_steps=0,
)
SMALL = ("--batch-size", "1", "--max-length", "8")
OURS, NOTE = "onelayer: ", "onelayer: note: "


@dataclass(frozen=True)
class Fault:
    """What befalls a command, a part of the line that says so, and what the command keeps next to its output.

    `strike` is given torchrun when something is kept; without it the command's input is at fault.
    """

    command: tuple[str, ...]
    said: str
    strike: Callable[[psutil.Process], None] | None = None
    kept: str = ""


def kill(rank: int) -> Callable[[psutil.Process], None]:
    """Return a function that kills the process of this rank."""

    def strike(torchrun: psutil.Process) -> None:
        for child in torchrun.children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                child.kill()

    return strike


def interrupt(torchrun: psutil.Process) -> None:
    """Do what Ctrl-C does: torchrun's processes are in sessions of their own."""
    torchrun.send_signal(signal.SIGINT)


COMPILE = ("compile", "model", "--calibration", "data.jsonl", "--ratio", "0.5", *SMALL, "--output", "out")
TRAIN = ("train", "model", "--data", "data.jsonl", *SMALL, "--save-steps", "1", "--max-steps", "500", "--output", "out")
UNITS, CHECKPOINTS = ".out.compile/unit-*.json", ".out.training/checkpoint-*/complete"
FAULTS = {
    "missing data": Fault(("evaluate", "model", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    "broken row": Fault(("evaluate", "model", "--data", "broken.jsonl", *SMALL), "loss is nan"),
    "killed compile": Fault(COMPILE, "another process", kill(1), UNITS),
    "killed training": Fault(TRAIN, "another process", kill(0), CHECKPOINTS),
    "Ctrl-C in compile": Fault(COMPILE, "interrupted", interrupt, UNITS),
    "Ctrl-C in training": Fault(TRAIN, "interrupted", interrupt, CHECKPOINTS),
}


def prepare(path: Path) -> None:
    """Write a model that cannot read unknown words, rows, and rows with such a word in the last."""
    make_files(path, SHAPE, torch.device("cpu"))
    file = path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][2] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    (path / "broken.jsonl").write_text((path / "data.jsonl").read_text() + "\n" + json.dumps({"text": "unknown words"}))


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def struck(path: Path, fault: Fault, home: Path) -> tuple[int, float, str]:
    """Run a command under torchrun; return its exit code, the seconds from the fault to its end, and all output."""
    printed = home / "printed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    environment = {**os.environ, "ONELAYER_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(printed, "wb") as output:
        running = subprocess.Popen(
            [*launcher, "-m", "onelayer.runtime", *fault.command],
            cwd=path,
            env=environment,
            stdout=output,
            stderr=output,
        )
    begun = time.monotonic()
    while running.poll() is None and time.monotonic() - begun < MOST_SECONDS:
        if any(path.glob(fault.kept)) if fault.strike is not None else OURS in printed.read_text(errors="replace"):
            break
        time.sleep(0.02)
    at_fault = time.monotonic()
    if fault.strike is not None and running.poll() is None:
        fault.strike(psutil.Process(running.pid))
    try:
        code = running.wait(MOST_SECONDS)
    except subprocess.TimeoutExpired:
        running.kill()
        code = running.wait()
    return code, time.monotonic() - at_fault, printed.read_text(errors="replace")


def checked(name: str, fault: Fault, path: Path) -> bool:
    """Strike one run, print what happened, and return whether it ended as it should."""
    with tempfile.TemporaryDirectory() as home:
        before = {file.name for file in path.iterdir()}
        code, seconds, printed = struck(path, fault, Path(home))
    lines = printed.splitlines()
    ours = [line for line in lines if OURS in line and NOTE not in line]
    own_traceback = any("File " in line and f"{os.sep}onelayer{os.sep}" in line for line in lines)
    left = {file.name for file in path.iterdir()} - before
    allowed = {Path(fault.kept).parts[0], f"{Path(fault.kept).parts[0]}.lock"} if fault.kept else set()
    right = [
        code != 0,
        seconds < LIMIT_SECONDS,
        len(ours) == 1 and fault.said in ours[0],
        not own_traceback,
        left <= allowed,
    ]
    figures = {"code": code, "seconds": round(seconds, 2), "ours": ours, "lines of torchrun": len(lines) - len(ours)}
    print(json.dumps({"fault": name, "right": all(right), **figures, "left": sorted(left)}), flush=True)
    if not all(right):
        print(printed, file=sys.stderr)
    return all(right)


def main() -> int:
    """Strike every run, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAULTS, help="this fault alone")
    only = parser.parse_args().only
    found = []
    for name, fault in FAULTS.items():
        if only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder))
                found.append(checked(name, fault, Path(folder)))
    return int(not all(found))


if __name__ == "__main__":
    sys.exit(main())
