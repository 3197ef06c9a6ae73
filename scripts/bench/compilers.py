"""Compiles one model by ours, llmcompressor's GPTQ and gptqmodel, from the same rows to about equal bytes.

    python -m scripts.bench.compilers --model DIR --data train.jsonl --held-out test.jsonl --work DIR [--rounds 1]

Both peers store 4 bits a value with a 16-bit scale for each group of 64. They are installed in DIR, pinned, without
their dependencies, for the torch and transformers of this environment. Every line is one JSON object: wall and
processor seconds, growth of the process, bits per value of the linears and loss on held-out rows. Each compile has a
process of its own, and rounds take all in turn. What cannot run is a line with its error.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.options import parser_of

PEERS = {
    "llmcompressor": ["llmcompressor==0.14.0.1", "loguru", "compressed-tensors==0.20.1"],
    "gptqmodel": [
        "gptqmodel==7.7.0",
        "pypcre",
        "tokenicer",
        "logbar",
        "device-smi",
        "defuser",
        "dill",
        "torchao",
        "threadpoolctl",
    ],
}
BITS, GROUP = 4, 64
PEER_BITS = BITS + 16 / GROUP
# From the peers' bytes on, ours takes whole nf4 for codes.
CODED_BITS = 4.2
Rows = list[list[int]]
# How the result is loaded for scoring, which the figures leave out, and its bits per value.
Compiled = tuple[Callable[[], Any], float]


def rows_of(path: Path, arguments: argparse.Namespace) -> Rows:
    """Read rows of exactly `length` tokens, so that no tool pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = (json.loads(line)["text"] for line in path.read_text().splitlines())
    tokens = (tokenizer(text)["input_ids"][: arguments.length] for text in texts)
    return [row for row in tokens if len(row) == arguments.length][: arguments.rows]


def loss(model: Any, rows: Rows) -> float:
    """Compute the mean loss of rows of one length."""
    import torch

    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in torch.tensor(rows).split(4)]
    return sum(losses) / len(losses)


def ours(arguments: argparse.Namespace, rows: Rows, **settings: Any) -> Compiled:
    """Compile to an emulator."""
    from transformers import AutoTokenizer

    from onelayer.compiler import compile_emulator
    from onelayer.runtime import load_emulator
    from scripts.quality.bench import layer_bytes

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data, output = arguments.child / "rows.jsonl", arguments.child / "emulator"
    data.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in rows))
    given = {"samples": len(rows), "max_length": arguments.length, "batch_size": 4}
    compile_emulator(arguments.model, str(data), output, device="cpu", **given, **settings)
    return lambda: load_emulator(output), 16 * layer_bytes(output) / layer_bytes(arguments.model)


def ours_codes(arguments: argparse.Namespace, rows: Rows) -> Compiled:
    """Compile to codes."""
    return ours(arguments, rows, form="coded", keep_bytes=CODED_BITS / 16)


def ours_nf4(arguments: argparse.Namespace, rows: Rows) -> Compiled:
    """Round whole weights to nf4, QLoRA's base."""
    return ours(arguments, rows, keep_bytes=0.99, factor_dtype="nf4", rank_allocation="uniform")


def llmcompressor(arguments: argparse.Namespace, rows: Rows) -> Compiled:
    """Run GPTQ of llmcompressor on the model in memory."""
    import torch
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationArgs,
        QuantizationScheme,
    )
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=BITS, group_size=GROUP, strategy="group", symmetric=True)
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows))
    return lambda: model, PEER_BITS


def gptqmodel(arguments: argparse.Namespace, rows: Rows) -> Compiled:
    """Run gptqmodel, which packs and saves; its own loader reads what it saved."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    model = GPTQModel.load(str(arguments.model), QuantizeConfig(bits=BITS, group_size=GROUP), device="cpu")
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.tensor(rows)])
    saved = str(arguments.child / "saved")
    model.save(saved)
    return lambda: GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH).model, PEER_BITS


COMPILERS: dict[str, Callable[[argparse.Namespace, Rows], Compiled]] = {
    work.__name__: work for work in (ours_codes, ours_nf4, llmcompressor, gptqmodel)
}


def compile_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one compiler in this process; return its line."""
    import torch

    from onelayer.compiler.machine.meter import Meter

    name = arguments.only
    sys.path.append(str(arguments.work / name))
    torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {"compiler": name}
    try:
        rows, held_out = rows_of(arguments.data, arguments), rows_of(arguments.held_out, arguments)
        importlib.import_module("onelayer.runtime" if name.startswith("ours") else name)
        with Meter(torch.device("cpu")) as meter:
            wall, processor = time.perf_counter(), time.process_time()
            load, bits = COMPILERS[name](arguments, rows)
            figures |= {
                "seconds": round(time.perf_counter() - wall, 1),
                "processor_seconds": round(time.process_time() - processor, 1),
                "peak_bytes": meter.sample(),
            }
        figures |= {"bits": round(bits, 3), "loss": round(loss(load(), held_out), 4)}
    except Exception as error:
        figures["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return figures


def main() -> None:
    """Install the peers, then run every compiler in a child process, round by round."""
    arguments = _arguments()
    if arguments.only:
        with open(arguments.child / "line.json", "w") as line:
            json.dump(compile_here(arguments), line)
        return
    for name, packages in PEERS.items():
        if not (arguments.work / name).exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--target", arguments.work / name, *packages], check=False)
    os.environ.update(ONELAYER_HOME=str(arguments.work / "home"), GPTQMODEL_CPU_WORKERS=str(max(2, arguments.threads)))
    for number in range(arguments.rounds):
        for name in COMPILERS:
            child = arguments.work / f"{name} {number}"
            child.mkdir(parents=True)
            command = [sys.executable, "-m", "scripts.bench.compilers", *sys.argv[1:], "--only", name]
            with open(child / "log", "w") as log:
                subprocess.run([*command, "--child", child], stdout=log, stderr=log, check=False)
            line = child / "line.json"
            print(line.read_text() if line.exists() else json.dumps({"compiler": name, "error": "killed"}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, rows=32, length=96, rounds=1, threads=2)
    parser.add_argument("--model", type=Path, required=True, help="directory of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="rows of text that calibrate")
    parser.add_argument("--held-out", type=Path, required=True, help="rows of text that score")
    parser.add_argument("--work", type=Path, required=True, help="directory for packages and outputs")
    parser.add_argument("--only", choices=COMPILERS, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
