"""Compares every command with its physical floor, and measures how cost grows.

    python -m scripts.bench.every_command [--width 1024] [--layers 4]

The floor of a command is the longer of two times: for the bytes that it must read (and write) at the disk's bandwidth,
and for the multiply-adds that it must do at the speed of the machine's own float32 matrix product. Both are measured
here, in turn with the commands. The script then compiles at three depths, widths and sample counts, and fits the
exponent of a power law. `--gpu` repeats the table with an 8B-shaped model in bfloat16 on the first GPU.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    evaluate_model,
    merge_adapter,
    polish_adapter,
    refine_emulator,
)
from onelayer.runtime import train_lora
from scripts.bench.compile import make_model
from scripts.bench.files import forget, measured, read_once, tensors_of
from scripts.bench.options import parser_of

RATIO, LORA_RANK, TRAIN_STEPS = 0.25, 8, (2, 8)
REFINE_STEPS, STEP_SAMPLES = 20, 4


@dataclass(frozen=True)
class Size:
    """The sizes that determine the arithmetic of a Llama."""

    width: int
    layers: int
    samples: int
    tokens: int
    vocabulary: int = 512

    @property
    def rows(self) -> int:
        """The tokens of all samples."""
        return self.samples * self.tokens

    @property
    def linears(self) -> list[tuple[int, int]]:
        """The (out, in) of the linears of one layer."""
        square, up = (self.width, self.width), (int(2.75 * self.width), self.width)
        return [square] * 4 + [up, up, up[::-1]]

    @property
    def layer_weights(self) -> int:
        """The parameters of all layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linears)

    @property
    def linear_forward(self) -> float:
        """The multiply-adds of the linears of all layers for all rows."""
        return self.rows * self.layer_weights

    @property
    def forward(self) -> float:
        """The same with the causal half of attention."""
        return self.linear_forward + self.rows * self.layers * self.tokens * self.width

    @property
    def head(self) -> float:
        """The multiply-adds of the head."""
        return self.rows * self.width * self.vocabulary

    @property
    def moments(self) -> float:
        """The multiply-adds of the symmetric half of one moment per linear; linears with one input share theirs."""
        sides = [min(shape) for shape in self.linears]
        distinct = [sides[0], sides[3], sides[4], sides[6]]  # q, k, v and gate, up read the same rows
        return self.rows * self.layers * sum(side * side for side in distinct) / 2


@dataclass(frozen=True)
class Floors:
    """Measured speeds of this machine: bytes per second of a read, multiply-adds per second of a product."""

    disk_bytes: float
    multiply_adds: float

    def seconds(self, size_bytes: float, multiply_adds: float) -> tuple[float, float]:
        """Return the least seconds for the bytes and for the arithmetic."""
        return size_bytes / self.disk_bytes, multiply_adds / self.multiply_adds


def measure_floors(model: Path, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Floors:
    """Measure medians of five: reading the checkpoint from the disk, and the product of a layer's widest linear."""
    tensors = tensors_of([model], "")
    reads = []
    for _ in range(5):
        forget([model])
        reads.append(measured(lambda: read_once(tensors)))
    x = torch.randn(min(rows, 4096), width, device=device, dtype=dtype)
    W = torch.randn(width, int(2.75 * width), device=device, dtype=dtype)

    def product() -> None:
        x @ W
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    seconds = median(measured(product) for _ in range(5))
    disk_bytes = sum(info.size_bytes for info in tensors)
    return Floors(disk_bytes / median(reads), x.shape[0] * W.numel() / seconds)


def works(folder: Path, model: Path, data: Path, size: Size, device: str) -> dict[str, Callable[[], float]]:
    """List the commands in order, each returning its own seconds; later ones need the outputs of earlier ones."""
    limits: dict[str, Any] = {"max_length": size.tokens, "device": device}
    out = folder / "out"

    def fresh(work: Callable[[], Any]) -> float:
        shutil.rmtree(out, ignore_errors=True)
        forget([model])
        return measured(work)

    def train(steps: int) -> float:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        return train_lora(
            folder / "emulator", data, folder / "adapter", max_steps=steps, batch_size=4, max_length=size.tokens,
            lora_rank=LORA_RANK, args={"use_cpu": device == "cpu"},
        ).seconds  # fmt: skip

    def step() -> float:
        # Take the difference of a long and a short run: loading and reading data cost the same in both.
        short, long = TRAIN_STEPS
        return (train(long) - train(short)) / (long - short)

    def compile_() -> float:
        shutil.rmtree(folder / "emulator", ignore_errors=True)
        settings: dict[str, Any] = {"ratio": RATIO, "samples": size.samples, "solver": "fast", **limits}
        return fresh(lambda: compile_emulator(model, data, folder / "emulator", **settings))

    adapter = folder / "adapter"
    return {
        "compile": compile_,
        "refine": lambda: fresh(
            lambda: refine_emulator(
                folder / "emulator", model=model, calibration=str(data), output=out, steps=REFINE_STEPS,
                step_samples=STEP_SAMPLES, samples=size.samples, **limits,
            )
        ),
        "training step": step,
        "correct": lambda: fresh(
            lambda: correct_adapter(adapter, emulator=folder / "emulator", model=model, output=out, limit=3.0)
        ),
        "evaluate": lambda: fresh(lambda: evaluate_model(model, str(data), adapters=[adapter], **limits)),
        "polish step": lambda: fresh(
            lambda: polish_adapter(
                None, model=model, data=str(data), output=out, steps=1, batch_size=size.samples,
                lora_rank=LORA_RANK, **limits,
            )
        ),
        "merge": lambda: fresh(lambda: merge_adapter(adapter, model=model, output=out)),
    }  # fmt: skip


def needs(size: Size, disk_bytes: float) -> dict[str, tuple[float, float]]:
    """Count the least bytes and multiply-adds of each command."""
    sides = size.layers * sum(rows + columns for rows, columns in size.linears)
    batch = 4 / size.samples
    low_rank = RATIO * size.linear_forward
    return {
        "compile": (disk_bytes * (1 + RATIO), size.forward + size.moments),
        # Count the original once, its factors twice to judge them, and forward and backward for every step.
        "refine": (
            disk_bytes * (1 + 2 * RATIO),
            size.forward
            + (2 + 3 * REFINE_STEPS * STEP_SAMPLES / size.samples) * (low_rank + size.forward - size.linear_forward),
        ),
        "training step": (0, batch * (2 * low_rank + 2 * size.head)),
        "correct": (disk_bytes * (1 + RATIO), LORA_RANK * (1 + RATIO) * size.layer_weights),
        "evaluate": (disk_bytes, 2 * (size.forward + size.head) + size.rows * LORA_RANK * sides),
        "polish step": (2 * disk_bytes, 3 * size.forward + 2 * size.head),
        "merge": (2 * disk_bytes, LORA_RANK * size.layer_weights),
    }


def table(size: Size, rounds: int, device: str, dtype: str = "float32") -> None:
    """Print seconds of every command next to its floor, medians over interleaved rounds."""
    with tempfile.TemporaryDirectory(prefix="onelayer-bench-") as name:
        folder = Path(name)
        os.environ["ONELAYER_HOME"] = f"{folder}/home"
        model, data = make_model(folder, size.width, size.layers, size.samples, size.tokens, dtype)
        disk_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        place, kind = torch.device(device), getattr(torch, dtype)
        seconds: dict[str, list[float]] = {}
        found = []
        for _ in range(rounds):
            found.append(measure_floors(model, size.width, size.rows, place, kind))
            for command, work in works(folder, model, data, size, device).items():
                seconds.setdefault(command, []).append(work())
    floors = Floors(median(item.disk_bytes for item in found), median(item.multiply_adds for item in found))
    print(
        f"\n{size.layers} layers of width {size.width}, {dtype}, {disk_bytes / 1e9:.2f} GB, {size.samples} samples of "
        f"{size.tokens} tokens, {device}; read {floors.disk_bytes / 1e9:.2f} GB/s, {floors.multiply_adds / 1e9:.0f} G "
        f"multiply-adds/s\n"
    )
    print("| command | seconds | bytes alone | arithmetic alone | above the floor |\n|---|---|---|---|---|")
    for command, (size_bytes, multiply_adds) in needs(size, disk_bytes).items():
        reading, computing = floors.seconds(size_bytes, multiply_adds)
        taken = median(seconds[command])
        ratio = taken / max(reading, computing)
        print(f"| {command} | {taken:.2f} | {reading:.2f} | {computing:.2f} | {ratio:.1f} x |")


def growth(base: Size, device: str) -> None:
    """Print seconds of the compile at three depths, widths and sample counts, and the exponent of each."""
    steps: dict[str, list[Size]] = {
        "depth": [Size(base.width // 2, layers, base.samples, base.tokens) for layers in (2, 4, 8)],
        "width": [
            Size(width, 3, base.samples, base.tokens) for width in (base.width // 4, base.width // 2, base.width)
        ],
        "samples": [Size(base.width // 2, 3, samples, base.tokens) for samples in (8, 16, 32)],
    }
    print("\n| compile against | values | seconds | exponent |\n|---|---|---|---|")
    for name, sizes in steps.items():
        taken = [_compile_seconds(size, device) for size in sizes]
        values = [{"depth": size.layers, "width": size.width, "samples": size.samples}[name] for size in sizes]
        shown = ", ".join(f"{value:.2f}" for value in taken)
        print(f"| {name} | {', '.join(map(str, values))} | {shown} | {exponent(values, taken):.2f} |", flush=True)


def _compile_seconds(size: Size, device: str) -> float:
    """Return the seconds of the faster of two compiles: other work on the machine can only add time."""
    with tempfile.TemporaryDirectory(prefix="onelayer-bench-") as name:
        folder = Path(name)
        model, data = make_model(folder, size.width, size.layers, size.samples, size.tokens)
        return min(works(folder, model, data, size, device)["compile"]() for _ in range(2))


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit the least-squares slope of log seconds over log values."""
    x, y = [math.log(value) for value in values], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Print the table, the growth, and the table on a GPU if requested."""
    parser = parser_of(__doc__, width=1024, layers=4, samples=16, tokens=256, rounds=3)
    parser.add_argument("--gpu", action="store_true", help="an 8B-shaped model on the first GPU (16 GB of disk)")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    size = Size(arguments.width, arguments.layers, arguments.samples, arguments.tokens)
    table(size, arguments.rounds, "cpu")
    growth(size, "cpu")
    if arguments.gpu:
        table(Size(4096, 40, 64, 2048), 1, "cuda", "bfloat16")
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
