"""Measures what codes cost compared with nf4: compiling, and a training step, in pairs on the same model and data.

    python -m scripts.bench.codes --model DIR --data train.jsonl [--keep-bytes 0.145] [--rounds 3]

Every round compiles each emulator once and trains a few steps on it, one after the other, so that a busy machine slows
all alike. Ratios are medians over rounds. nf4 factors have the bytes of the codes; nf4 whole is QLoRA's base.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from onelayer.compiler import compile_emulator
from onelayer.runtime import train_lora
from scripts.bench.options import parser_of

FACTORS, WHOLE, CODES, FORWARD = "nf4 factors", "nf4 whole", "codes", "codes, no pass back"
# Of all linears whole in nf4, the share of bytes is whatever they take.
WHOLE_BYTES = 0.99


def settings(kind: str, keep_bytes: float) -> dict[str, Any]:
    """Return how an emulator of a kind is compiled."""
    if kind in (CODES, FORWARD):
        return {"keep_bytes": keep_bytes, "form": "coded", "backward": kind == CODES}
    if kind == WHOLE:
        return {"keep_bytes": WHOLE_BYTES, "factor_dtype": "nf4", "rank_allocation": "uniform"}
    return {"keep_bytes": keep_bytes, "form": "factors", "factor_dtype": "nf4"}


def measured(kind: str, folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Compile one emulator and train on it; return seconds and peaks of both."""
    data = {"samples": given.samples, "max_length": given.max_length}
    report = compile_emulator(
        given.model, given.data, folder / "emulator", **settings(kind, given.keep_bytes), **data
    ).report
    trained = train_lora(
        folder / "emulator",
        given.data,
        folder / "adapter",
        max_steps=given.steps,
        batch_size=given.batch_size,
        max_length=given.max_length,
    )
    return {
        "compile": report.seconds,
        "step": trained.seconds / trained.steps,
        "compile_peak": report.peak_device_bytes,
        "train_peak": trained.peak_device_bytes,
    }


def main() -> None:
    """Measure round by round; print a line for each kind."""
    given = _arguments()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in (FACTORS, WHOLE, CODES, FORWARD)}
    for number in range(given.rounds):
        for kind, rows in found.items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measured(kind, Path(folder), given))
            print(f"round {number}: {kind}: {rows[-1]}", flush=True)
    print(
        f"\n{'':20} {'compile':>10} {'of nf4':>7} {'step':>9} {'of whole':>9} {'compile peak':>13} {'train peak':>11}"
    )
    for kind, rows in found.items():
        compiled, step, *peaks = (median(row[name] for row in rows) for name in rows[0])
        ratio, share = _ratio(rows, found[FACTORS], "compile"), _ratio(rows, found[WHOLE], "step")
        sizes = [f"{peak / 1e6:.0f} MB" for peak in peaks]
        print(f"{kind:20} {compiled:8.1f} s {ratio:7.2f} {step:7.2f} s {share:9.2f} {sizes[0]:>13} {sizes[1]:>11}")


def _ratio(rows: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    return median(one[name] / other[name] for one, other in zip(rows, others, strict=True))


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, keep_bytes=0.145, rounds=3, samples=64, max_length=256, steps=6, batch_size=4)
    parser.add_argument("--model", required=True, help="directory of a causal model")
    parser.add_argument("--data", required=True, help="rows of text, for calibration and training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
