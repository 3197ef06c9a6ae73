"""Compares the time of a merge with `cp` of the same checkpoint.

    python -m scripts.bench.merge [--runs 5]

Writes a Llama of random weights (at least 2 GB) and an adapter of all its linears to a temporary directory. Then it
times in turn: reading the checkpoint; copying it with `cp` and flushing the copy; merging, which also flushes.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from onelayer.compiler import merge_adapter
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.files import sync
from scripts.bench.files import Shape, forget, measured, read_once, spread, tensors_of, write_adapter, write_original
from scripts.bench.options import parser_of


def main() -> None:
    """Make the files, time the runs, print the ratios."""
    options = parser_of(__doc__, runs=5, layers=Shape.layers, rank=16).parse_args()
    with tempfile.TemporaryDirectory(prefix="onelayer-bench-") as folder:
        os.environ["ONELAYER_HOME"] = f"{folder}/home"
        root, shape = Path(folder), Shape(layers=options.layers)
        write_original(root / "original", shape)
        write_adapter(root / "adapter", shape, options.rank)
        print(f"hashed in {measured(lambda: model_digest(root / 'original')):.2f} s, once for each checkpoint")
        for state in ("disk", "cache"):
            run(root, options.runs, state)


def run(root: Path, runs: int, state: str) -> None:
    """Time reading, copying and merging in turn."""
    original = root / "original"
    tensors = tensors_of([original], "")
    works = {"read": lambda: read_once(tensors), "cp": lambda: copy(root), "merge": lambda: merge(root)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            if state == "disk":
                forget([original])
            seconds[name].append(measured(work))
            shutil.rmtree(root / "out", ignore_errors=True)
    print(f"from the {state}: " + ", ".join(f"{name} {spread(values)} s" for name, values in seconds.items()))
    rows = list(zip(seconds["read"], seconds["cp"], seconds["merge"], strict=True))
    print(f"  merge / cp {spread([merged / copied for _, copied, merged in rows])}")
    print(f"  merge / (1.5 cp + read) {spread([merged / (1.5 * copied + read) for read, copied, merged in rows])}")


def copy(root: Path) -> None:
    """Run `cp` and a flush: a copy that is as safe as the merge."""
    subprocess.run(["cp", "-r", root / "original", root / "out"], check=True)
    for file in (root / "out").iterdir():
        sync(file)


def merge(root: Path) -> None:
    """Run one merge, as a user would call it."""
    merge_adapter(root / "adapter", model=root / "original", output=root / "out")


if __name__ == "__main__":
    main()
