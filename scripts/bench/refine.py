"""Measures the cost of a refinement: time next to the compile of its emulator, and memory.

    python -m scripts.bench.refine [--width 1024] [--layers 4] [--samples 64] [--tokens 256] [--steps 100]
    python -m scripts.bench.refine --depths 6 36        the peak at two depths, each in its own process
    python -m scripts.bench.refine --gigabytes 8        a checkpoint larger than the memory allowance

Weights are random, so the gain is not measured here; `scripts.quality.cells` measures it.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from onelayer.compiler import compile_emulator, refine_emulator
from onelayer.compiler.compile.outcome import CompileResult
from onelayer.compiler.refine.command import RefineResult
from onelayer.compiler.results import Report
from scripts.bench.compile import make_model
from scripts.bench.memory import Benchmark

DEFAULT: dict[str, Any] = {"keep_bytes": 0.12}
# Spectra of 80 wide layers take hours of one core, and this measurement does not need them.
UNIFORM: dict[str, Any] = {"ratio": 0.25, "factor_dtype": "nf4"}


def both(
    model: Path, data: Path, folder: Path, samples: int, tokens: int, size: dict[str, Any], **settings: Any
) -> tuple[CompileResult, RefineResult]:
    """Compile an emulator, then refine it on the same samples."""
    given: dict[str, Any] = {"samples": samples, "max_length": tokens}
    compiled = compile_emulator(model, data, folder / "emulator", solver="fast", **size, **given)
    given |= {"model": model, "calibration": str(data), "output": folder / "refined", **settings}
    return compiled, refine_emulator(folder / "emulator", **given)


def compare(arguments: argparse.Namespace) -> None:
    """Print the seconds of both."""
    with tempfile.TemporaryDirectory() as name:
        model, data = make_model(Path(name), arguments.width, arguments.layers, arguments.samples, arguments.tokens)
        sizes = (arguments.samples, arguments.tokens, DEFAULT)
        compiled, refined = both(model, data, Path(name), *sizes, steps=arguments.steps)
    times = refined.report.seconds / compiled.report.seconds
    print(
        f"{arguments.layers} layers of width {arguments.width}, {arguments.samples} samples of {arguments.tokens} "
        f"tokens, nf4 at 0.12 of the bytes\ncompile {compiled.report.seconds:.1f} s, refine with {arguments.steps} "
        f"steps of 8 samples {refined.report.seconds:.1f} s ({times:.1f} times)"
    )


def at_depth(model: Path, data: Path, folder: Path) -> Report:
    """Send waiting data to files, so that only the rest is measured."""
    _, refined = both(model, data, folder, 8, 128, DEFAULT, steps=4, host_memory_bytes=1 << 20)
    return refined.report


def large(model: Path, data: Path, folder: Path) -> Report:
    """Refine every layer for a few steps."""
    _, refined = both(model, data, folder, 8, 128, UNIFORM, steps=2, step_samples=4)
    return refined.report


if __name__ == "__main__":
    benchmark = Benchmark(__doc__, width=1024, layers=4, samples=64, tokens=256, steps=100)
    sys.exit(benchmark.run(compare, at_depth, large))
