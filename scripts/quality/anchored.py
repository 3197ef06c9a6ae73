"""Makes the table of anchored training: a line per emulator, a column per way to train on it, and what follows.

    python -m scripts.quality.anchored DIR/results.jsonl

A figure is the share of direct LoRA's gain that reaches the original, with its standard deviation over seeds; fewer
seeds than the task has are written after it. Only tasks with anchored rows are shown.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from scripts.quality.tables import Row, with_shares

ANCHORED = re.compile(r"(.+)\+anchor(\d+)")
PLAIN = "uncorrected"


def way_of(row: Row) -> str:
    """Name a row's column: how the adapter was trained, and what was done to it afterwards."""
    anchored = ANCHORED.fullmatch(row["kind"])
    way = f"every {anchored[2]} steps" if anchored else "plain"
    if row["row"] == PLAIN:
        return way
    stage = str(row["row"]).removeprefix(f"{PLAIN} + ")
    return f"{way}, {stage} exact steps" if stage.isdigit() else f"{way}, {stage}"


def emulator_of(row: Row) -> tuple[float, str]:
    """Return the size and the kind of the emulator of a row, without the way to train."""
    return row["size"], str(row["kind"]).partition("+")[0]


def print_anchored(rows: Sequence[Row]) -> None:
    """Write the table of one task in Markdown."""
    seeds = len({row["seed"] for row in rows})
    for name in ("original", "direct"):
        losses = [row["loss"] for row in rows if row["row"] == name]
        print(f"{name}: {mean(losses):.4f} nats per token, {len(losses)} seeds")
    scored = [row for row in rows if row["kind"] != "direct" and row["row"] not in ("emulator", "on the emulator")]
    ways = sorted({way_of(row) for row in scored}, key=_order)
    print("\n| emulator | bytes MB | " + " | ".join(ways) + " |\n" + "|---" * (2 + len(ways)) + "|")
    for size, kind in sorted({emulator_of(row) for row in scored if "bytes" in row}):
        own = [row for row in scored if emulator_of(row) == (size, kind)]
        megabytes = next(row["bytes"] for row in own if "bytes" in row) / 1e6
        cells = [_cell([row["share"] for row in own if way_of(row) == way], seeds) for way in ways]
        print(f"| {kind}{'' if size == 1 else f' {size:g}'} | {megabytes:.1f} | {' | '.join(cells)} |")


def _order(way: str) -> tuple[bool, int, str]:
    """Plain training comes first, then anchors from rare to frequent; what follows a training comes after it."""
    every = re.match(r"every (\d+)", way)
    return every is not None, -int(every[1]) if every else 0, way


def _cell(shares: Sequence[float], seeds: int) -> str:
    if not shares:
        return ""
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread} %" + ("" if len(shares) == seeds else f" (seeds: {len(shares)})")


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    rows = [json.loads(line) for path in parser.parse_args().results for line in path.read_text().splitlines()]
    for task in dict.fromkeys(row["task"] for row in rows if "+anchor" in row["kind"]):
        print(f"\n## {task}\n")
        print_anchored(with_shares([row for row in rows if row["task"] == task]))


if __name__ == "__main__":
    main()
