"""Times one training step on emulators of equal rank, by factor dtype: forward and backward, the dtypes in turn.

    python -m scripts.bench.quantized --model DIR --train train.jsonl [--ratio 0.25]

`scripts.quality.cells` measures how good an emulator of a given size is.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from onelayer.compiler import compile_emulator
from onelayer.runtime import load_emulator
from scripts.bench.options import parser_of

DTYPES = (None, "bf16", "int8", "nf4")


def main() -> None:
    """Compile the emulators, time the steps, print a line for each dtype."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        models = {str(dtype): _adapted(arguments, Path(name) / str(dtype), dtype) for dtype in DTYPES}
        vocabulary = models["None"].config.vocab_size
        ids = torch.arange(arguments.batch_size * arguments.max_length).reshape(arguments.batch_size, -1) % vocabulary
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                seconds[name].append(time.perf_counter() - started)
    reference = median(seconds["bf16"][1:])
    for name, values in seconds.items():
        label = "float" if name == "None" else name
        print(f"{label:6}{median(values[1:]):9.3f} s{median(values[1:]) / reference:8.3f} of bf16, {arguments.ratio}")


def _adapted(arguments: argparse.Namespace, path: Path, dtype: Any) -> Any:
    """Load an emulator of that dtype with a fresh LoRA on all linears."""
    settings: dict[str, Any] = {"ratio": arguments.ratio, "factor_dtype": dtype, "samples": 8, "max_length": 64}
    compile_emulator(arguments.model, arguments.train, path, **settings)
    lora = LoraConfig(r=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_emulator(path), lora)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, ratio=0.25, rounds=13, batch_size=4, max_length=256, lora_rank=8)
    parser.add_argument("--model", required=True, help="directory of a causal model")
    parser.add_argument("--train", required=True, help="calibration data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
