"""Predicts tokens per second by way of training, for public models on several cards, hosts and disks, as markdown.

python -m scripts.plan.ways

Nothing here is measured. The ways are those of `onelayer plan`: an emulator, the same with anchors, and exact training
of the original, streamed from disk or, where it fits the card, in memory.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onelayer.runtime.planning.choice import EVERY_FORM, SMALLEST_RATIO, Choice, best_stored, choose
from onelayer.runtime.planning.plan import SAMPLES
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun
from onelayer.runtime.planning.ways import WayCost, way_costs
from scripts.plan.table import ASSUMED, GIB, MODELS

CARDS_GIB, HOSTS_GIB, DISKS = (8, 12, 24), (16, 32, 64), (1e9, 3.5e9, 7e9)
MAX_LENGTH = 512
# An exact step reads the whole model, so it gets more rows than a step on an emulator.
EMULATOR_ROWS, EXACT_ROWS = 8, (64, 32, 16, 8)
GPT_OSS_120B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "dtype": "bfloat16",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
CHOSEN = {
    "8B": MODELS["8B dense (Llama 3 8B)"],
    "32B": MODELS["32B dense (Qwen3 32B)"],
    "70B": MODELS["70B dense (Llama 3 70B)"],
    "gpt-oss-120b, MXFP4": GPT_OSS_120B,
}
# Tokens per second that RoundPipe (arXiv 2604.27085) reports; it holds the model in the memory of the host.
ROUNDPIPE = {"8B": 3142, "32B": 740}


def main() -> None:
    """Print the table."""
    tflops = ASSUMED.flops_per_second / 1e12
    print(f"Planned tokens per second: emulator / anchored / exact, for cards that reach {tflops:.0f} TFLOP/s.")
    print(
        f"Emulators train on {EMULATOR_ROWS} rows of {MAX_LENGTH} tokens a step, the original on up to {EXACT_ROWS[0]}."
    )
    print("Exact steps stream, or where marked with * hold the original on the card; - does not fit.\n")
    head = ["model", "card", "host", *(f"{disk / 1e9:g} GB/s" for disk in DISKS)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, config in CHOSEN.items():
        shapes = shapes_of_config(config)
        for card in CARDS_GIB:
            best = best_choice(shapes, card * GIB)
            for host in HOSTS_GIB:
                cells = [cell(shapes, best, card * GIB, host * GIB, disk) for disk in DISKS]
                print(f"| {' | '.join([name, f'{card} GB', f'{host} GB', *cells])} |", flush=True)
    reported = " and ".join(f"{tokens} ({name})" for name, tokens in ROUNDPIPE.items())
    print(
        f"\nRoundPipe (arXiv 2604.27085) reports {reported} tokens/s on RTX 4090 cards; its host holds the whole model."
    )


def shapes_of_config(config: Mapping[str, Any]) -> ModelShapes:
    """Return the shapes of a model that only its configuration describes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_shapes(Path(folder))


def best_choice(shapes: ModelShapes, memory_bytes: int) -> Choice:
    """Choose the best emulator."""
    planned = PlannedRun(EMULATOR_ROWS, MAX_LENGTH)
    choices = {stored: choose(shapes, planned, memory_bytes, stored) for stored in EVERY_FORM}
    return choices[best_stored({stored: choice.ratio for stored, choice in choices.items()})]


def cell(shapes: ModelShapes, best: Choice, memory_bytes: int, host_bytes: int, disk: float) -> str:
    """Format tokens per second of the emulator, the anchored emulator and the fastest exact way."""
    speed = ASSUMED.model_copy(update={"read_bytes_per_second": disk})

    def rates(rows: int) -> dict[str, float | None]:
        choice = replace(best, planned=replace(best.planned, batch_size=rows))
        ratio = best.ratio or SMALLEST_RATIO
        seconds = seconds_at(speed, shapes, choice.planned, ratio=ratio, samples=SAMPLES, polish_batch=rows)
        ways = way_costs(shapes, choice, memory_bytes, host_bytes, speed, seconds)
        return {way.way: tokens_per_second(way, rows) for way in ways}

    emulated, exact = rates(EMULATOR_ROWS), [rates(rows) for rows in EXACT_ROWS]
    held, streamed = (max((each[name] or 0 for each in exact), default=0) for name in ("resident", "streamed"))
    shown = f"{held:.0f}*" if held and held >= streamed else _text(streamed or None)
    return " / ".join([*(_text(emulated[name]) for name in ("emulator", "anchored")), shown])


def tokens_per_second(way: WayCost, rows: int) -> float | None:
    """Return the tokens per second of a way with so many rows a step; None if it does not fit."""
    return rows * MAX_LENGTH / way.seconds_per_step if way.fits and way.seconds_per_step else None


def _text(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:.0f}"


if __name__ == "__main__":
    main()
