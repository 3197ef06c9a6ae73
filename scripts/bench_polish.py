"""What an exact step costs: beside two bare streamed forwards and the backward's arithmetic, and in memory.

    python scripts/bench_polish.py [--width 1024] [--layers 6] [--samples 16] [--tokens 256] [--rounds 3]
    python scripts/bench_polish.py --depths 6 36        the peak at two depths, each in a process of its own
    python scripts/bench_polish.py --gigabytes 8        a checkpoint larger than the memory that is allowed

The floor of a step: two bare streamed forwards over the same batches (every layer is read twice and computed twice),
and the backward pass of one resident layer with its adapter, times layers and batches. Weights are random.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from bench_compile import make_model
from bench_memory import make_checkpoint
from onelayer.compiler import polish_adapter
from onelayer.compiler.adapter import Adapter
from onelayer.compiler.calibration import TokenBatch, make_batches, read_tokens
from onelayer.compiler.gradients import GradientStream
from onelayer.compiler.measure import Meter
from onelayer.compiler.polish_start import Fresh, open_trained
from onelayer.compiler.stream import Stream
from onelayer.compiler.token_loss import TokenLoss
from onelayer.compiler.tokens import load_tokenizer
from onelayer.compiler.units import StreamedModel

CPU = torch.device("cpu")


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def backward_seconds(streamed: StreamedModel, batches: list[TokenBatch]) -> float:
    """The backward pass of one resident layer with its adapter over all batches: arithmetic and nothing else."""
    unit = next(unit for unit in streamed.units if unit.is_block)
    spent = 0.0

    def run(index: int, args: Any, kwargs: Any) -> Any:
        nonlocal spent
        with torch.enable_grad():
            hidden = args[0].detach().requires_grad_()
            output = type(unit.module).forward(unit.module, hidden, *args[1:], **kwargs)
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

    def around(found: Any) -> Any:
        from contextlib import nullcontext

        return Around() if found is unit else nullcontext()

    with Meter(CPU) as meter:
        stream = Stream(streamed, CPU, meter, around=around, last=unit.position)
        stream.run([batch.inputs for batch in batches], lambda index, output: None)
    return spent


def compare(arguments: argparse.Namespace) -> None:
    """The step beside its floor, in interleaved rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = make_model(folder, arguments.width, arguments.layers, arguments.samples, arguments.tokens)
        Fresh(8, 8, "all-linear", 0).write(folder / "adapter", model)
        streamed, _ = open_trained(model, Adapter.open(folder / "adapter"), CPU)
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


def one_step(model: Path, data: Path, folder: Path, **settings: Any) -> Any:
    """One exact step of a fresh adapter on everything in `data`."""
    return polish_adapter(
        None, model=model, data=data, output=folder / "out", steps=1, lora_rank=8, lora_alpha=8, **settings
    )


def depth(layers: int) -> None:
    """The figures of one depth, as JSON; unit inputs go to files, so that only the rest is seen."""
    with tempfile.TemporaryDirectory() as name:
        model, data = make_model(Path(name), 512, layers, samples=8, tokens=128)
        result = one_step(model, data, Path(name), batch_size=8, max_length=128, host_memory_bytes=1 << 20)
    print(json.dumps(result.model_dump(mode="json")))


def depths(numbers: list[int]) -> None:
    """The peak at every depth."""
    for layers in numbers:
        child = [sys.executable, __file__, "--layers", str(layers), "--one-depth"]
        result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        report = result["report"]
        promised = (report["largest_unit_bytes"] + report["workspace_bytes"]) / 1e6
        print(
            f"{layers:3} layers: peak {report['peak_device_bytes'] / 1e6:.1f} MB (unit + workspace {promised:.1f} MB), "
            f"adapter {4 * result['trainable_parameters'] / 1e6:.1f} MB, "
            f"inputs in files {result['spilled_bytes'] / 1e6:.1f} MB"
        )


def large(arguments: argparse.Namespace) -> int:
    """One step on a checkpoint of the given size; 1 above the allowance."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        model = make_checkpoint(Path(name), arguments.gigabytes)
        disk_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        result = one_step(model, Path(name) / "data.jsonl", Path(name), batch_size=2, max_length=128)
    report, step = result.report, result.steps[0]
    print(f"checkpoint on disk        {disk_bytes / 1e9:8.2f} GB")
    print(f"read by the step          {step.bytes_read / 1e9:8.2f} GB in {step.seconds:.0f} s")
    print(f"largest unit              {report.largest_unit_bytes / 1e9:8.3f} GB")
    print(f"workspace, predicted      {report.workspace_bytes / 1e9:8.3f} GB")
    print(f"layer inputs on the host  {result.kept_bytes / 1e9:8.3f} GB")
    print(f"growth during the pass    {report.peak_device_bytes / 1e9:8.3f} GB")
    print(f"peak of the whole process {report.peak_host_bytes / 1e9:8.3f} GB, allowed {arguments.allowance} GB")
    return int(report.peak_host_bytes > arguments.allowance * 1e9)


def main() -> int:
    """One of the three benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("width", 1024), ("layers", 6), ("samples", 16), ("tokens", 256), ("rounds", 3)):
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
