"""Measures the memory of compiling a checkpoint larger than the allowance: peak anonymous bytes, bytes on disk.

    python -m scripts.bench.memory [--gigabytes 8] [--allowance 2] [--directory DIR]

Makes a checkpoint of random bfloat16 weights one layer at a time (it is never in memory as a whole), compiles it, and
prints the peak memory of the process. Exits with 1 above the allowance. The directory needs twice the space.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.results import Report
from scripts.bench.compile import make_model
from scripts.bench.options import parser_of

WIDTH, WIDE = 2048, 5632


def make_checkpoint(directory: Path, gigabytes: float) -> Path:
    """Write a Llama with as many layers as needed, one shard each."""
    model, _ = make_model(directory, WIDTH, 1, samples=8, tokens=128)
    config = json.loads((model / "config.json").read_text())
    head = transformers.LlamaForCausalLM.from_pretrained(model).state_dict()
    (model / "model.safetensors").unlink()
    shapes = {name: tensor.shape for name, tensor in head.items() if ".layers.0." in name}
    layer_bytes = 2 * sum(shape.numel() for shape in shapes.values())
    layers = int(gigabytes * 1e9 / layer_bytes) + 1
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in tqdm(range(layers), desc="make the checkpoint", disable=None, leave=False):
        shard = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) / WIDTH**0.5 if len(shape) == 2 else torch.ones(shape)
            shard[name.replace(".layers.0.", f".layers.{number}.")] = noise.bfloat16()
        file = f"model-{number + 1:05d}.safetensors"
        save_file(shard, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    rest = {name: tensor.bfloat16().clone() for name, tensor in head.items() if name not in shapes}
    save_file(rest, model / "model-rest.safetensors", {"format": "pt"})
    weight_map |= dict.fromkeys(rest, "model-rest.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "dtype": "bfloat16"}))
    return model


def print_figures(report: Report, model: Path, allowance: float) -> int:
    """Print the figures of a pass over a checkpoint; return 1 if the process held more than `allowance` GB."""
    disk_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"checkpoint on disk        {disk_bytes / 1e9:8.2f} GB")
    print(f"bytes read                {report.bytes_read / 1e9:8.2f} GB in {report.seconds:.0f} s")
    print(f"largest unit              {report.largest_unit_bytes / 1e9:8.3f} GB")
    print(f"workspace, predicted      {report.workspace_bytes / 1e9:8.3f} GB")
    print(f"growth during the pass    {report.peak_device_bytes / 1e9:8.3f} GB")
    print(f"peak of the whole process {report.peak_host_bytes / 1e9:8.3f} GB, allowed {allowance} GB")
    return int(report.peak_host_bytes > allowance * 1e9)


class Benchmark:
    """Benchmarks of a streamed pass: against its floor, at depths in separate processes, and on a large checkpoint."""

    def __init__(self, description: str, **defaults: int) -> None:
        self.parser = parser_of(description, **defaults)
        self.parser.add_argument("--depths", type=int, nargs="+")
        self.parser.add_argument("--one-depth", action="store_true", help=argparse.SUPPRESS)
        self.parser.add_argument("--gigabytes", type=float)
        self.parser.add_argument("--allowance", type=float, default=3.0, help="GB of anonymous memory")
        self.parser.add_argument("--directory", type=Path, help="directory of the checkpoint; default: a temporary one")

    def run(
        self,
        compare: Callable[[argparse.Namespace], None],
        at_depth: Callable[[Path, Path, Path], Report],
        large: Callable[[Path, Path, Path], Report],
    ) -> int:
        """Run the requested benchmarks; passes take a model, data and a directory. Return 1 above the allowance."""
        arguments = self.parser.parse_args()
        transformers.utils.logging.disable_progress_bar()
        if arguments.one_depth:
            with tempfile.TemporaryDirectory() as name:
                model, data = make_model(Path(name), 512, arguments.layers, samples=8, tokens=128)
                print(at_depth(model, data, Path(name)).model_dump_json())
        elif arguments.depths:
            self._depths(arguments.depths)
        elif arguments.gigabytes:
            with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
                model = make_checkpoint(Path(name), arguments.gigabytes)
                return print_figures(large(model, Path(name) / "data.jsonl", Path(name)), model, arguments.allowance)
        else:
            compare(arguments)
        return 0

    @staticmethod
    def _depths(numbers: list[int]) -> None:
        for layers in numbers:
            child = [sys.executable, sys.argv[0], "--layers", str(layers), "--one-depth"]
            report = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            promised = (report["largest_unit_bytes"] + report["workspace_bytes"]) / 1e6
            peak = report["peak_device_bytes"] / 1e6
            print(f"{layers:3} layers: peak {peak:.1f} MB (unit + workspace {promised:.1f} MB)", flush=True)


def main() -> int:
    """Make a checkpoint, compile it, print figures, compare with the allowance."""
    parser = parser_of(__doc__, gigabytes=8.0)
    parser.add_argument("--allowance", type=float, default=2.0, help="GB of anonymous memory")
    parser.add_argument(
        "--directory", type=Path, help="directory of the checkpoint; default: the system's temporary one"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        model = make_checkpoint(Path(name), arguments.gigabytes)
        settings: dict[str, Any] = {"ratio": 0.25, "samples": 8, "max_length": 128}
        result = compile_emulator(model, Path(name) / "data.jsonl", Path(name) / "emulator", solver="fast", **settings)
        return print_figures(result.report, model, arguments.allowance)


if __name__ == "__main__":
    sys.exit(main())
