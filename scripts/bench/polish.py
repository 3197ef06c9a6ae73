"""Measures the cost of an exact step: time against two streamed forwards and the backward's arithmetic, and memory.

    python -m scripts.bench.polish [--width 1024] [--layers 6] [--samples 16] [--tokens 256] [--rounds 3]
    python -m scripts.bench.polish --depths 6 36        the peak at two depths, each in its own process
    python -m scripts.bench.polish --gigabytes 8        a checkpoint larger than the memory allowance

The floor of a step is two bare streamed forwards over the same batches (every layer is read and computed twice), plus
the backward pass of one resident layer with its adapter, times layers and batches. Weights are random.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from onelayer.compiler import polish_adapter
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.polish.command import PolishResult
from onelayer.compiler.polish.trained_adapter import FreshAdapter, attach_trainable
from onelayer.compiler.results import Report
from onelayer.compiler.streaming.gradient_stream import GradientStream
from onelayer.compiler.streaming.stream import Stream
from onelayer.compiler.streaming.token_loss import TokenLoss
from scripts.bench.compile import make_model
from scripts.bench.memory import Benchmark

CPU = torch.device("cpu")


def timed(work: Callable[[], Any]) -> float:
    """Measure the seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def backward_seconds(streamed: StreamedModel, batches: list[TokenBatch]) -> float:
    """Time the backward pass of one resident layer with its adapter over all batches: arithmetic only."""
    unit = next(unit for unit in streamed.units if unit.is_block)
    spent = 0.0

    def run(index: int, args: Any, kwargs: Any) -> Any:
        nonlocal spent
        with torch.enable_grad():
            hidden = args[0].detach().requires_grad_()
            output = unit.forward(hidden, *args[1:], **kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            gradient = torch.randn_like(first)
            start = time.perf_counter()
            first.backward(gradient)
            spent += time.perf_counter() - start
        return first.detach() if isinstance(output, torch.Tensor) else (first.detach(), *output[1:])

    class Around:
        def __enter__(self) -> Any:
            return run

        def __exit__(self, *exception: object) -> None:
            pass

    def on_unit(found: Any) -> Any:
        from contextlib import nullcontext

        return Around() if found is unit else nullcontext()

    with Meter(CPU) as meter:
        stream = Stream(streamed, CPU, meter, on_unit=on_unit, stop_after=unit.position)
        stream.run([batch.inputs for batch in batches], lambda index, output: None)
    return spent


def compare(arguments: argparse.Namespace) -> None:
    """Time the step and its floor in interleaved rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = make_model(folder, arguments.width, arguments.layers, arguments.samples, arguments.tokens)
        FreshAdapter(8, 8, "all-linear", 0).write(folder / "adapter", model)
        adapted, _ = attach_trainable(model, Adapter.open(folder / "adapter"), CPU)
        streamed = adapted.streamed
        bare = StreamedModel(model)
        tokens = read_tokens(data, load_tokenizer(model), arguments.tokens)
        batches = make_batches(tokens, streamed.config, 1)
        inputs = [batch.inputs for batch in batches]
        steps, forwards, backwards, read_bytes = [], [], [], 0
        with Meter(CPU) as meter, GradientStream(streamed, CPU, meter, trained=len(batches)) as stream:

            def step() -> None:
                loss = TokenLoss(batches, len(batches), CPU)
                stream.run(inputs, loss.take)
                assert loss.finish()
                stream.reverse()

            for _ in range(arguments.rounds):
                before = streamed.checkpoint.bytes_read
                steps.append(timed(step))
                read_bytes = streamed.checkpoint.bytes_read - before
                forwards.append(timed(lambda: Stream(bare, CPU, meter).run(inputs, lambda index, output: None)))
                layers = sum(unit.is_block for unit in streamed.units)
                backwards.append(layers * backward_seconds(streamed, batches))
        disk_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    floors = [2 * forward + backward for forward, backward in zip(forwards, backwards, strict=True)]
    ratios = [step / floor for step, floor in zip(steps, floors, strict=True)]
    print(f"{arguments.layers} layers of width {arguments.width}, {len(batches)} samples of {arguments.tokens} tokens")
    print(f"bare streamed forward {median(forwards):7.2f} s")
    print(f"backward arithmetic   {median(backwards):7.2f} s")
    print(f"floor                 {median(floors):7.2f} s")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"exact step            {median(steps):7.2f} s, {median(ratios):.2f} x the floor {spread}")
    print(f"read                  {read_bytes / 1e6:7.1f} MB, {read_bytes / disk_bytes:.2f} x the checkpoint")


def one_step(model: Path, data: Path, folder: Path, **settings: Any) -> PolishResult:
    """Run one exact step of a fresh adapter on all of `data`."""
    return polish_adapter(
        None, model=model, data=data, output=folder / "out", steps=1, lora_rank=8, lora_alpha=8, **settings
    )


def at_depth(model: Path, data: Path, folder: Path) -> Report:
    """Send unit inputs to files, so that only the rest is measured."""
    return one_step(model, data, folder, batch_size=8, max_length=128, host_memory_bytes=1 << 20).report


def large(model: Path, data: Path, folder: Path) -> Report:
    """Run one step and measure its memory on the host."""
    result = one_step(model, data, folder, batch_size=2, max_length=128)
    print(f"layer inputs on the host  {result.kept_bytes / 1e9:8.3f} GB")
    return result.report


if __name__ == "__main__":
    sys.exit(Benchmark(__doc__, width=1024, layers=6, samples=16, tokens=256, rounds=3).run(compare, at_depth, large))
