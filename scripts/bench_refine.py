"""What a refinement costs: beside the compile of its emulator, and in memory.

    python scripts/bench_refine.py [--width 1024] [--layers 4] [--samples 64] [--tokens 256] [--steps 100]
    python scripts/bench_refine.py --depths 6 36        the peak at two depths, each in a process of its own
    python scripts/bench_refine.py --gigabytes 8        a checkpoint larger than the memory that is allowed

Weights are random, so nothing is said of what it gains: bench_quality.py does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

from bench_compile import make_model
from bench_memory import make_checkpoint
from onelayer.compiler import compile_emulator, refine_emulator


def both(model: Path, data: Path, folder: Path, samples: int, tokens: int, **settings: Any) -> tuple[Any, Any]:
    """Compile, then refine on the same samples."""
    given: dict[str, Any] = {"samples": samples, "max_length": tokens}
    compiled = compile_emulator(model, data, folder / "emulator", keep_bytes=0.12, solver="fast", **given)
    given |= {"model": model, "calibration": str(data), "output": folder / "refined", **settings}
    return compiled, refine_emulator(folder / "emulator", **given)


def compare(arguments: argparse.Namespace) -> None:
    """Seconds of both."""
    with tempfile.TemporaryDirectory() as name:
        model, data = make_model(Path(name), arguments.width, arguments.layers, arguments.samples, arguments.tokens)
        compiled, refined = both(model, data, Path(name), arguments.samples, arguments.tokens, steps=arguments.steps)
    times = refined.report.seconds / compiled.report.seconds
    print(
        f"{arguments.layers} layers of width {arguments.width}, {arguments.samples} samples of {arguments.tokens} "
        f"tokens, nf4 at 0.12 of the bytes\ncompile {compiled.report.seconds:.1f} s, refine with {arguments.steps} "
        f"steps of 8 samples {refined.report.seconds:.1f} s ({times:.1f} times)"
    )


def depth(layers: int) -> None:
    """The report of one depth, as JSON; what waits goes to files, so that only the rest is seen."""
    with tempfile.TemporaryDirectory() as name:
        model, data = make_model(Path(name), 512, layers, samples=8, tokens=128)
        _, refined = both(model, data, Path(name), 8, 128, steps=4, host_memory_bytes=1 << 20)
    print(refined.report.model_dump_json())


def depths(numbers: list[int]) -> None:
    """The peak at every depth."""
    for layers in numbers:
        child = [sys.executable, __file__, "--layers", str(layers), "--one-depth"]
        report = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        promised = (report["largest_unit_bytes"] + report["workspace_bytes"]) / 1e6
        peak = report["peak_device_bytes"] / 1e6
        print(f"{layers:3} layers: peak {peak:.1f} MB (unit + workspace {promised:.1f} MB)", flush=True)


def large(arguments: argparse.Namespace) -> int:
    """A few steps for every layer of a checkpoint of the given size; 1 above the allowance."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        model = make_checkpoint(Path(name), arguments.gigabytes)
        disk_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        _, refined = both(model, Path(name) / "data.jsonl", Path(name), 8, 128, steps=2, step_samples=4)
    report = refined.report
    print(f"checkpoint on disk        {disk_bytes / 1e9:8.2f} GB")
    print(f"read                      {report.bytes_read / 1e9:8.2f} GB in {report.seconds:.0f} s")
    print(f"largest unit              {report.largest_unit_bytes / 1e9:8.3f} GB")
    print(f"workspace, predicted      {report.workspace_bytes / 1e9:8.3f} GB")
    print(f"growth during the pass    {report.peak_device_bytes / 1e9:8.3f} GB")
    print(f"peak of the whole process {report.peak_host_bytes / 1e9:8.3f} GB, allowed {arguments.allowance} GB")
    return int(report.peak_host_bytes > arguments.allowance * 1e9)


def main() -> int:
    """One of the three benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = (("width", 1024), ("layers", 4), ("samples", 64), ("tokens", 256), ("steps", 100))
    for option, default in defaults:
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--one-depth", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--allowance", type=float, default=3.0, help="GB of anonymous memory")
    parser.add_argument("--directory", type=Path, help="where the checkpoint goes; by default the temporary directory")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.one_depth:
        depth(arguments.layers)
    elif arguments.depths:
        depths(arguments.depths)
    elif arguments.gigabytes:
        return large(arguments)
    else:
        compare(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
