"""Times a step of a streamed model next to one of the same model in memory with gradient checkpointing.

    python -m scripts.bench.streamed MODEL [--rows 8] [--tokens 256] [--pairs 3] [--cache SIZE]
    python -m scripts.bench.streamed MODEL --alone resident|streamed         the peak of one way in its own process
    python -m scripts.bench.streamed --gigabytes 8 [--allowance 3] [--directory DIR]

Both steps are PEFT's LoRA on all linears with the model's own loss, on the same random rows, in turn in one process.
With `--gigabytes` a checkpoint of random weights is made, which is larger than the memory allowance, and a step is
compared with what its bytes and its multiply-adds take at least. The system's cache is emptied of it all the time, as
on a host that has no memory to spare. Exits with 1 above the allowance.
"""

import argparse
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers

from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.results import Report
from onelayer.runtime import streamed_for_training
from onelayer.runtime.sizes import parse_size, size
from scripts.bench.files import forget
from scripts.bench.memory import make_checkpoint, print_figures
from scripts.bench.options import parser_of

# A wanted ratio to the resident step, and to the floor of a step on a large checkpoint.
MOST_RATIO, MOST_FLOORS = 1.15, 1.2
EVICTION_SECONDS = 0.25
RATE_BYTES = 2 << 30


def adapted(model: Any, rank: int) -> Any:
    """Return the model with a LoRA of that rank on all linears, the same for every model of the same shape."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear")).train()


def resident(directory: Path, rank: int) -> Any:
    """Load the model into memory, with checkpointing of every layer."""
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(directory), rank)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def step_seconds(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Take the gradients of one batch; return wall seconds and processor seconds, reading threads included."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    model(input_ids=ids, labels=ids).loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF)
    model.zero_grad()
    return time.perf_counter() - wall, sum(
        getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")
    )


def compare(arguments: argparse.Namespace) -> int:
    """Take resident and streamed steps in turn; print each pair, and return 1 if the ratio is too large."""
    streamed = adapted(streamed_for_training(arguments.model, cache_bytes=arguments.cache), arguments.rank)
    ids = random_ids(streamed, arguments.rows, arguments.tokens)
    models = {"resident": resident(arguments.model, arguments.rank), "streamed": streamed}
    print(f"{arguments.rows} x {arguments.tokens} tokens, {torch.get_num_threads()} threads, {streamed.dtype}")
    print("pair  resident: wall, processor s   streamed: wall, processor s   ratio of wall, of processor time")
    pairs: list[tuple[float, float]] = []
    checkpoint = streamed.get_base_model().streaming.streamed.checkpoint
    for number in range(arguments.pairs + 1):  # the first warms up
        read = checkpoint.bytes_read
        (wall, spent), (streamed_wall, streamed_spent) = (step_seconds(model, ids) for model in models.values())
        ratios = streamed_wall / wall, streamed_spent / spent
        figures = (
            f"{wall:9.1f} {spent:9.1f} {streamed_wall:19.1f} {streamed_spent:9.1f} {ratios[0]:18.3f} {ratios[1]:8.3f}"
        )
        print(f"{number or 'warm':4}{figures}", flush=True)
        pairs += [ratios] if number else []
    read_bytes = checkpoint.bytes_read - read
    walls, processors = zip(*pairs, strict=True)
    print(f"read in a step {size(read_bytes)}")
    for name, values in (("wall", walls), ("processor", processors)):
        print(f"{name} time: {median(values):.3f} times the resident step ({min(values):.3f} to {max(values):.3f})")
    return int(median(processors) > MOST_RATIO)


def alone(arguments: argparse.Namespace) -> int:
    """Take two steps in one way; print how far the process grew from before the model was opened."""
    with Meter(torch.device("cpu")) as meter:
        if arguments.alone == "resident":
            model = resident(arguments.model, arguments.rank)
        else:
            model = adapted(streamed_for_training(arguments.model, cache_bytes=arguments.cache), arguments.rank)
        for _ in range(2):
            step_seconds(model, random_ids(model, arguments.rows, arguments.tokens))
        print(f"{arguments.alone}: peak {size(meter.sample())}")
    if arguments.alone == "streamed":
        streaming = model.get_base_model().streaming
        report: Report = streaming.report()
        promised = report.largest_unit_bytes + report.workspace_bytes
        print(f"promised {size(promised)}, without kept inputs of {size(streaming.kept_bytes)}")
    return 0


def random_ids(model: Any, rows: int, tokens: int) -> torch.Tensor:
    """Make rows of random tokens, the same in every run."""
    return torch.randint(3, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def large(arguments: argparse.Namespace) -> int:
    """Take a step on a checkpoint larger than the allowance; print its time next to the floor, and its memory."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = make_checkpoint(Path(name), arguments.gigabytes)
        model = adapted(streamed_for_training(directory, host_memory_bytes=0), arguments.rank)
        ids = random_ids(model, arguments.rows, arguments.tokens)
        streaming = model.get_base_model().streaming
        floor = floor_seconds(directory, model, ids.numel())
        with uncached(directory):
            wall, spent = step_seconds(model, ids)
        report: Report = streaming.report()
        print(f"step                      {wall:8.1f} s, {spent:.1f} s of processor time")
        print(f"bytes and arithmetic alone{floor:8.1f} s: {wall / floor:.2f} times, wanted {MOST_FLOORS}")
        return print_figures(report, directory, arguments.allowance)


@contextmanager
def uncached(directory: Path) -> Iterator[None]:
    """Keep the files of a directory out of the system's cache."""
    ended = threading.Event()
    forget([directory])
    descriptors = [os.open(file, os.O_RDONLY) for file in directory.rglob("*") if file.is_file()]

    def evict() -> None:
        while not ended.wait(EVICTION_SECONDS):
            for descriptor in descriptors:  # nothing writes to them, so that no waiting for the disk is needed
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for descriptor in descriptors:
            os.close(descriptor)


def floor_seconds(directory: Path, model: Any, tokens: int) -> float:
    """Return the longer of reading the checkpoint twice and of three products for every weight and token."""
    config = model.config
    sides = config.hidden_size, config.intermediate_size
    files = sorted(directory.glob("*.safetensors"))
    sizes = {file: file.stat().st_size for file in files}
    read = [file for number, file in enumerate(files) if sum(list(sizes.values())[:number]) < RATE_BYTES]
    forget([directory])
    rate = sum(sizes[file] for file in read) / timed(lambda: [len(file.read_bytes()) for file in read])
    reading = 2 * sum(sizes.values()) / rate
    left, right = torch.randn(tokens, sides[0]).to(model.dtype), torch.randn(sides[1], sides[0]).to(model.dtype)
    speed = tokens * sides[0] * sides[1] / min(timed(lambda: torch.nn.functional.linear(left, right)) for _ in range(3))
    weights = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    computing = 3 * tokens * weights / speed
    print(f"reading alone {reading:.1f} s at {size(int(rate))}/s, arithmetic alone {computing:.1f} s")
    return float(max(reading, computing))


def timed(work: Callable[[], Any]) -> float:
    """Measure the seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    """Run the comparison, or the step on a large checkpoint."""
    parser = parser_of(__doc__, rows=8, tokens=256, pairs=3, rank=8)
    parser.add_argument("model", nargs="?", type=Path, help="directory of a causal model")
    parser.add_argument("--alone", choices=("resident", "streamed"))
    parser.add_argument("--cache", type=parse_size, default=0, help="host memory for the last layers")
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--allowance", type=float, default=3.0, help="GB of anonymous memory")
    parser.add_argument("--directory", type=Path, help="directory of the checkpoint; default: a temporary one")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.gigabytes is None):
        parser.error("give a model, or --gigabytes")
    if arguments.gigabytes is not None:
        return large(arguments)
    return compare(arguments) if arguments.alone is None else alone(arguments)


if __name__ == "__main__":
    sys.exit(main())
