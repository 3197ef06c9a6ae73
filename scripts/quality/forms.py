"""Measures LoRA on images: how much of what direct LoRA learns on two new kinds of forms reaches the original.

    python -m scripts.quality.forms WORK [--base-steps N] [--steps N] [--seeds 0 1 2] [--emulators KIND:SIZE ...]

The base is trained on the spot (`scripts.quality.forms_task`), in about two minutes of processor time. Emulators and
ways to train are those of `scripts.quality.cells`; every tower, projector and layer is compressed, and LoRA adapts the
language model. Adapters are scored on the original, by loss and by exact match: the share of rows whose whole answer
has the highest logit at every place. `published` and `qlora` are judged as their authors use them. Each result is
appended to WORK/results.jsonl; what is recorded is not made again. `--table` prints the table and makes nothing.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED
from scripts.quality.bench import Bench, layer_bytes
from scripts.quality.cells import kind_and_size
from scripts.quality.emulators import resident
from scripts.quality.forms_task import HELD_OUT, LENGTH, TASKS, TRAINED, check_reading, train_base, write_rows
from scripts.quality.tables import JUDGED, with_shares

ROWS, TEST_ROWS = 400, 128
# The linears of this model are too small for codes at 0.12.
EMULATORS = (
    *("qlora:1", "published:0.25", "nf4+anchor10:0.25", "coded+anchor10:0.25"),
    *("published:0.12", "nf4+anchor10:0.12", "nf4:0.25", "coded:0.25", "nf4:0.12"),
)


@torch.no_grad()
def score(model: Path, adapter: Path | None, rows: Path) -> dict[str, float]:
    """Return the loss per token and the exact match of the original, with an adapter if one is given."""
    original = resident(model)
    reader = load_reader(model, type(original))
    batches = make_batches(read_tokens(rows, reader, LENGTH), original.config, 16)
    adapted = (original if adapter is None else PeftModel.from_pretrained(original, str(adapter))).eval()
    losses, hits = [], []
    for batch in batches:
        logits, targets = adapted(**batch.inputs, use_cache=False).logits.float(), batch.targets
        counted = targets != IGNORED
        losses.append(cross_entropy(logits[counted], targets[counted], reduction="none"))
        hits.append(((logits.argmax(-1) == targets) | ~counted).all(-1))
    return {"loss": float(torch.cat(losses).mean()), "exact": float(torch.cat(hits).float().mean())}


def measure(bench: Bench, kind: str, size: float, seed: int) -> None:
    """Record the original and direct LoRA, or one cell."""
    common: dict[str, Any] = {"kind": kind, "size": size, "seed": seed}
    if bench.recorded(**common):
        return
    if kind == "direct":
        rows = {"original": None, "direct": bench.direct(seed)}
    else:
        emulator, adapter = bench.emulator(kind.partition("+")[0], size), bench.trained(kind, size, seed)
        stage = JUDGED.get(kind, "uncorrected")
        rows = {stage: adapter if stage == "uncorrected" else bench.corrected(adapter, emulator, auto=False)}
        common["bytes"] = layer_bytes(emulator)
    bench.record([{"row": name, **score(bench.model, path, bench.test)} for name, path in rows.items()], **common)


def print_table(results: Path) -> None:
    """Print a row for each kind and size: loss, share of direct LoRA's gain and exact match, means over seeds."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for task in TASKS:
        rows = with_shares([line for line in lines if line["task"] == task])
        print(f"\n{task}\n\n| trained on | loss | share of the gain | exact match | seeds |\n|---|---|---|---|---|")
        for name in dict.fromkeys((row["kind"], row["size"], row["row"]) for row in rows):
            own = [row for row in rows if (row["kind"], row["size"], row["row"]) == name]
            loss, share, exact = (mean(row[field] for row in own) for field in ("loss", "share", "exact"))
            label = name[2] if name[0] == "direct" else f"{name[0]} {name[1]:g}, {name[2]}"
            print(f"| {label} | {loss:.4f} | {100 * share:.0f} % | {100 * exact:.0f} % | {len(own)} |")


def main() -> None:
    """Make the requested cells, one seed after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--base-steps", type=int, default=350)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--emulators", nargs="*", default=EMULATORS, help="as those of scripts.quality.cells")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        model = asked.work / "model"
        if not model.exists():
            train_base(model, asked.base_steps)
        benches = [bench_of(asked, model, task) for task in TASKS]
        for seed in asked.seeds:
            for kind, size in [("direct", 1.0), *map(kind_and_size, asked.emulators)]:
                for bench in benches:
                    measure(bench, kind, size, seed)
    print_table(asked.work / "results.jsonl")


def bench_of(asked: argparse.Namespace, model: Path, task: str) -> Bench:
    """Write the rows of a task, and return what makes its emulators and adapters."""
    train, held_out = asked.work / f"{task}.train.jsonl", asked.work / f"{task}.test.jsonl"
    write_rows(train, task, TRAINED, ROWS)
    write_rows(held_out, task, HELD_OUT, TEST_ROWS)
    check_reading(model, train, task, TRAINED)
    return Bench(
        argparse.Namespace(
            name=task, work=asked.work, model=model, train=train, held_out=held_out, validation_rows=0,
            choose_rows=None, test_rows=TEST_ROWS, steps=asked.steps, batch_size=16, learning_rate=3e-3,
            max_length=LENGTH,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
