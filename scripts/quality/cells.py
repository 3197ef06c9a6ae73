"""Measures how much of direct LoRA's gain reaches the original: every method and stage, on a given trained model.

    python -m scripts.quality.cells --name perl --model DIR --train train.jsonl --held-out test.jsonl --work DIR

For every seed the script trains LoRA on the original itself and on every emulator (kind:size, see
scripts/quality/emulators.py). A kind may name a way to train after a plus: `kind+layer` and `kind+sublayer` compress
activations, `kind+anchor10` streams the original every ten steps, and `kind+elastic` uses a random prefix of the
factors at every step. Adapters are scored on their emulator and on the original: uncorrected, corrected as published
(limit 3), corrected as chosen on held-out data, and after exact steps (`polish`). The first --validation-rows rows of
the held-out data choose, the next --test-rows rows score. Each result is appended to DIR/results.jsonl. Recorded
results are not made again, so an interrupted run can resume and several runs may share the work.
`scripts.quality.tables` makes tables and a picture from the file.
"""

import argparse
from pathlib import Path
from typing import Any

from scripts.quality.bench import Bench, Score, layer_bytes
from scripts.quality.emulators import restored
from scripts.quality.tables import STAGES


def direct(bench: Bench, seed: int) -> None:
    """Record the original, and LoRA on it."""
    if bench.recorded(seed=seed, row="direct"):
        return
    adapter = bench.direct(seed)
    before, after = bench.score([adapter], bench.test)
    rows = [_row("original", before), _row("direct", after) | bench.figures(adapter.name)]
    bench.record(rows, kind="direct", size=1.0, seed=seed)


def cell(bench: Bench, kind: str, size: float, seed: int) -> None:
    """Record the requested stages of one emulator except exact steps."""
    cell: dict[str, Any] = {"kind": kind, "size": size, "seed": seed}
    wanted = ["uncorrected"] if kind == "dropped" else bench.given.stages
    stages = [stage for stage in wanted if not bench.recorded(row=stage, **cell)]
    if not stages:
        return
    emulator, adapter = bench.emulator(kind.partition("+")[0], size), bench.trained(kind, size, seed)
    common = {**cell, "bytes": layer_bytes(emulator), **bench.figures(adapter.name)}
    if kind == "dropped":
        places = {int(small): number for small, number in bench.figures(emulator.name).items()}
        whole = bench.made(f"{adapter.name}-restored", lambda path: restored(adapter, path, places, bench.model))
        bench.record([_row("uncorrected", bench.score([whole], bench.test)[1])], **common)
        return
    rows = [_row(name, bench.resident_score(emulator, None)) for name in stages if name == "emulator"]
    rows += [_row(name, bench.resident_score(emulator, adapter)) for name in stages if name == "on the emulator"]
    adapters = {name: _adapter(bench, name, adapter, emulator) for name in stages if name in STAGES[2:]}
    if adapters:
        found = bench.score(adapters.values(), bench.test)[1:]
        rows += [_row(name, score) for name, score in zip(adapters, found, strict=True)]
    if "chosen" in adapters:
        rows[-1] |= bench.figures(adapters["chosen"].name)
    bench.record(rows, **common)


def polish(bench: Bench, kind: str, size: float, seed: int) -> None:
    """Record exact steps from the requested stages of an adapter; for `scratch`, from none."""
    cell: dict[str, Any] = {"kind": kind, "size": size, "seed": seed, "polished": True}
    starts = ["exact steps alone"] if kind == "scratch" else bench.given.polish_starts
    wanted = {f"{start} + {steps}": (start, steps) for start in starts for steps in bench.given.polish_steps}
    wanted = {name: stage for name, stage in wanted.items() if not bench.recorded(row=name, **cell)}
    if not wanted:
        return
    adapters = []
    for start, steps in wanted.values():
        if kind == "scratch":
            adapters.append(bench.polished(f"scratch-{seed}", None, steps, seed))
            continue
        emulator = bench.emulator(kind.partition("+")[0], size)
        adapter = _adapter(bench, start, bench.trained(kind, size, seed), emulator)
        adapters.append(bench.polished(adapter.name, adapter, steps, seed))
    found = bench.score(adapters, bench.test)[1:]
    bench.record([_row(name, score) for name, score in zip(wanted, found, strict=True)], **cell)


def _adapter(bench: Bench, stage: str, adapter: Path, emulator: Path) -> Path:
    return adapter if stage == "uncorrected" else bench.corrected(adapter, emulator, auto=stage == "chosen")


def _row(name: str, score: Score) -> dict[str, Any]:
    return {"row": name, "loss": score[0], "accuracy": score[1]}


def main() -> None:
    """Make the requested cells."""
    arguments = _arguments()
    bench = Bench(arguments)
    for seed in arguments.seeds:
        direct(bench, seed)
        for kind, size in arguments.emulators:
            cell(bench, kind, size, seed)
        for kind, size in arguments.polish:
            polish(bench, kind, size, seed)


def kind_and_size(text: str) -> tuple[str, float]:
    """Read `kind:size`; the size is 1 if it is left out."""
    kind, _, size = text.partition(":")
    return kind, float(size or 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the task in the results")
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained model")
    parser.add_argument("--train", type=Path, required=True, help="training data, also used for calibration")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="rows that choose the correction, then rows that score"
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for all outputs")
    parser.add_argument(
        "--emulators", type=kind_and_size, nargs="*", default=[], help="for example published:0.25 nf4:0.12"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="what to score of each emulator's adapter"
    )
    parser.add_argument(
        "--polish", type=kind_and_size, nargs="*", default=[], help="for example published:0.25 scratch"
    )
    parser.add_argument(
        "--polish-starts", nargs="+", choices=STAGES[2:], default=["uncorrected", "chosen"], help="where they start"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation-rows", type=int, default=60)
    parser.add_argument(
        "--choose-rows", type=int, help="use only this many validation rows; the test rows stay the same"
    )
    parser.add_argument("--test-rows", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--polish-steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--polish-batch", type=int, default=32)
    parser.add_argument("--polish-rate", type=float, default=5e-3)
    parser.add_argument("--scratch-rate", type=float, default=1.2e-2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
