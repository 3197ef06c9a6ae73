"""Compares the time of a correction with reading the same bytes once.

    python -m scripts.bench.correct [--runs 5]

Writes a Llama of random weights (at least 2 GB), an emulator and an adapter to a temporary directory. Then it times in
turn a bare read of the bytes that the correction needs, and the correction, from the disk and from the system's cache.
"""

import os
import shutil
import tempfile
from pathlib import Path

from onelayer.compiler import correct_adapter
from onelayer.compiler.storage.checkpoint import model_digest
from scripts.bench.files import (
    Shape,
    forget,
    measured,
    read_once,
    spread,
    tensors_of,
    write_adapter,
    write_emulator,
    write_original,
)
from scripts.bench.options import parser_of


def main() -> None:
    """Make the files, time the pairs, print the ratios."""
    options = parser_of(__doc__, runs=5, layers=Shape.layers, rank=16, ratio=0.25).parse_args()
    with tempfile.TemporaryDirectory(prefix="onelayer-bench-") as folder:
        os.environ["ONELAYER_HOME"] = f"{folder}/home"
        root, shape = Path(folder), Shape(layers=options.layers)
        write_original(root / "original", shape)
        write_emulator(root / "emulator", root / "original", shape, options.ratio)
        write_adapter(root / "adapter", shape, options.rank)
        for name in ("original", "emulator"):
            seconds = measured(lambda name=name: model_digest(root / name))  # type: ignore[misc]
            print(f"{name} hashed in {seconds:.2f} s, once for each checkpoint")
        run_pairs(root, options.runs)


def run_pairs(root: Path, runs: int) -> None:
    """Time reading and correcting in turn, cold and warm."""
    inputs = [root / "original", root / "emulator"]
    tensors = tensors_of(inputs, ".layers.")
    tensors = [info for info in tensors if "norm" not in info.name]
    print(f"{sum(info.size_bytes for info in tensors) / 1e9:.2f} GB to read")
    for state in ("disk", "cache"):
        reads, corrections = [], []
        for _ in range(runs):
            if state == "disk":
                forget(inputs)
            reads.append(measured(lambda: read_once(tensors)))
            if state == "disk":
                forget(inputs)
            corrections.append(measured(lambda: correct(root)))
            shutil.rmtree(root / "out")
        ratios = [correction / read for correction, read in zip(corrections, reads, strict=True)]
        print(f"from the {state}: read {spread(reads)} s, correct {spread(corrections)} s, ratio {spread(ratios)}")


def correct(root: Path) -> None:
    """Run one correction, as a user would call it."""
    correct_adapter(
        root / "adapter", emulator=root / "emulator", model=root / "original", output=root / "out", limit=3.0
    )


if __name__ == "__main__":
    main()
