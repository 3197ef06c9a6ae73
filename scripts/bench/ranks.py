"""Compares uniform ranks with ranks by spectrum at equal bytes: the emulator's own held-out loss and its errors.

    python -m scripts.bench.ranks --model DIR --calibration train.jsonl --test test.jsonl [--ratios 0.15 0.25 0.4]

Every emulator is compiled from the same samples, then scored together with its original in one streamed pass.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

from onelayer.compiler import compile_emulator, evaluate_model
from onelayer.compiler.factors.ranks import Allocation
from scripts.bench.options import parser_of


def main() -> None:
    """Compile both ways at every ratio, score, print a table; with --json write the figures."""
    parser = parser_of(__doc__, samples=64, max_length=512)
    parser.add_argument("--model", required=True, help="directory of a trained causal model")
    parser.add_argument("--calibration", required=True, nargs="+", help="texts for the moments")
    parser.add_argument("--test", required=True, help="held-out texts for the loss")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.25, 0.4])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    print(f"{'ratio':>6} {'ranks by':10}{'layer weights':>15}{'summed error':>14}{'loss':>9}{'KL':>8}{'top-1':>8}")
    rows = []
    for ratio in arguments.ratios:
        for allocation in get_args(Allocation):
            row = measure(arguments, ratio, allocation)
            rows.append(row)
            print(
                f"{ratio:6.2f} {allocation:10}{row['layer_parameters']:15,}{row['summed_error']:14.4f}"
                f"{row['loss']:9.4f}{row['kl_per_token']:8.4f}{row['top1_agreement']:8.3f}",
                flush=True,
            )
    print(f"loss of the original: {rows[0]['original_loss']:.4f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


def measure(arguments: argparse.Namespace, ratio: float, allocation: Allocation) -> dict[str, Any]:
    """Collect the figures of one emulator. `summed_error` sums |Y - Y'|^2 / |Y|^2 over all linears with outputs Y."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_emulator(
            arguments.model,
            arguments.calibration,
            Path(folder) / "emulator",
            ratio=ratio,
            samples=arguments.samples,
            max_length=arguments.max_length,
            rank_allocation=allocation,
        )
        scored = evaluate_model(
            arguments.model, arguments.test, against=Path(folder) / "emulator", max_length=arguments.max_length
        )
    assert scored.against is not None
    return {
        "ratio": ratio,
        "allocation": allocation,
        "layer_parameters": compiled.layer_parameters_after,
        "summed_error": sum(linear.error**2 for linear in compiled.linears),
        "original_loss": scored.results[0].loss,
        **scored.against.model_dump(include={"loss", "kl_per_token", "top1_agreement"}),
    }


if __name__ == "__main__":
    main()
