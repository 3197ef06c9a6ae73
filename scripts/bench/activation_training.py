"""Measures held-out loss of LoRA with plain and with compressed activations, per seed, on a given trained model.

    python -m scripts.bench.activation_training --model DIR --train train.jsonl --test test.jsonl

Every run is one `train_lora`. All adapters of a seed and the bare model are scored in one streamed pass.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from onelayer.compiler import evaluate_model
from onelayer.runtime import train_lora
from scripts.bench.options import parser_of

PLAIN = "plain"


def main() -> None:
    """Train, score, print a table; with --json write the figures."""
    arguments = _arguments()
    modes = [PLAIN, *arguments.modes]
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"seed": seed, "mode": mode, **train(arguments, Path(folder), mode, seed)} for mode in modes]
            scored = evaluate_model(
                arguments.model,
                arguments.test,
                adapters=[Path(folder) / mode for mode in modes],
                max_length=arguments.max_length,
                batch_size=8,
            )
            start, *losses = [result.loss for result in scored.results]
            for row, loss in zip(rows[-len(modes) :], losses, strict=True):
                row |= {"start_loss": start, "loss": loss, "ratio": loss / losses[0]}
                print(json.dumps(row), flush=True)
    print(f"\n{'':12}{'held-out loss':>14}{'of plain':>10}{'saved bytes':>14}")
    for mode in modes:
        own = [row for row in rows if row["mode"] == mode]
        loss, ratio = mean(row["loss"] for row in own), mean(row["ratio"] for row in own)
        print(f"{mode:12}{loss:14.4f}{ratio:10.4f}{own[0]['saved_activation_bytes']:14,}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


def train(arguments: argparse.Namespace, folder: Path, mode: str, seed: int) -> dict[str, Any]:
    """Train one adapter with the settings of the command line."""
    compressed = {} if mode == PLAIN else {"activations": mode, "activation_rank": arguments.rank}
    result = train_lora(
        arguments.model,
        arguments.train,
        folder / mode,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        seed=seed,
        **compressed,
    )
    return {"train_loss": result.train_loss, "saved_activation_bytes": result.saved_activation_bytes}


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, steps=100, batch_size=8, max_length=256, learning_rate=1e-3)
    parser.add_argument("--model", required=True, help="directory of a trained causal model")
    parser.add_argument("--train", required=True, help="training data")
    parser.add_argument("--test", required=True, help="held-out data")
    parser.add_argument("--modes", nargs="+", default=["sublayer", "layer"], choices=["sublayer", "layer"])
    parser.add_argument("--rank", type=float, default=1 / 8, help="share of the hidden size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
