"""Measures which learning rate and which schedule LoRA wants, on a model that fits in memory or on an emulator.

    python -m scripts.quality.learning_rates --model DIR --train perl.train.jsonl --held-out perl.test.jsonl \\
        --work DIR [--emulator DIR] [--rates 1e-4 1e-3] [--schedules linear cosine]

Every cell trains one adapter with the other settings of `scripts/quality/real.sh` and scores it on the model, with
held-out rows. With --emulator, it trains on that emulator of the model. Each cell is one JSON line, printed and
appended to DIR/learning_rates.jsonl. Recorded cells are not made again, so an interrupted run can resume.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from onelayer.compiler import evaluate_model
from onelayer.runtime import train_lora

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
# The schedules by their names, and the warmup that belongs to each: a share of the steps.
WARMUPS = {"linear": 0.0, "cosine": 0.0, "constant_with_warmup": 0.1}


def trained(arguments: argparse.Namespace, schedule: str, rate: float) -> tuple[Path, dict[str, Any]]:
    """Train the adapter of one cell; return its directory and what training found."""
    adapter = arguments.work / f"{schedule}-{rate:g}-{arguments.steps}-{arguments.seed}"
    result = train_lora(
        arguments.emulator or arguments.model, arguments.train, adapter, lora_rank=8, lora_alpha=16,
        max_steps=arguments.steps, seed=arguments.seed, batch_size=4, max_length=96, learning_rate=rate,
        warmup=WARMUPS[schedule], args={"lr_scheduler_type": schedule}, resume=True,
    )  # fmt: skip
    losses = [loss for _, loss in result.losses]
    return adapter, {"train_loss": result.train_loss, "last_losses": losses[-5:]}


def scored(arguments: argparse.Namespace, adapters: list[Path]) -> list[float]:
    """Return the held-out losses of the model without and with each adapter."""
    lines = arguments.held_out.read_text().splitlines(keepends=True)[arguments.skip :][: arguments.rows]
    test = arguments.work / "test.jsonl"
    test.write_text("".join(lines))
    found = evaluate_model(arguments.model, str(test), adapters=adapters, max_length=96, batch_size=8)
    return [result.loss for result in found.results]


def main() -> None:
    """Make the requested cells that are not recorded yet."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = arguments.work / "learning_rates.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    on = "model" if arguments.emulator is None else "emulator"
    for schedule in arguments.schedules:
        for rate in arguments.rates:
            cell = {"on": on, "schedule": schedule, "rate": rate, "steps": arguments.steps, "seed": arguments.seed}
            if any(cell.items() <= line.items() for line in done):
                continue
            adapter, figures = trained(arguments, schedule, rate)
            before, after = scored(arguments, [adapter])
            line = json.dumps({**cell, "original_loss": before, "loss": after, **figures})
            with open(results, "a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained model")
    parser.add_argument("--emulator", type=Path, help="an emulator of the model to train on instead")
    parser.add_argument("--train", type=Path, required=True, help="training data")
    parser.add_argument("--held-out", type=Path, required=True, help="data that score")
    parser.add_argument("--work", type=Path, required=True, help="directory for all outputs")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--schedules", nargs="+", choices=WARMUPS, default=list(WARMUPS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=24, help="held-out rows to leave out; real.sh chooses by them")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows that score")
    return parser.parse_args()


if __name__ == "__main__":
    main()
