"""Makes tables and a picture from the results of `scripts.quality.cells`.

    python -m scripts.quality.tables DIR/results.jsonl [--summary] [--plot FILE.png]

Figures are means over seeds. A share is relative to the gain in loss of LoRA trained on the original itself, with its
standard deviation over seeds. Sizes are bytes of the repeated layers' linears, as a share of their bytes at 16 bits.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

STAGES = ("emulator", "on the emulator", "uncorrected", "limit 3", "chosen")
# The stage by which a kind is judged: the one that its authors use, and for ours the chosen correction.
JUDGED = {"published": "limit 3", "dropped": "uncorrected", "qlora": "uncorrected"}
# The order of kinds in tables; others follow.
KINDS = (
    "published",
    "bf16",
    "int8",
    "nf4",
    "published-refined",
    "int8-refined",
    "nf4-refined",
    "qlora",
    "plain-svd",
    "dropped",
)
Row = dict[str, Any]


def main() -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true", help="only shares, a line per kind and a column per size")
    parser.add_argument("--plot", type=Path, help="draw shares against bytes into this file")
    arguments = parser.parse_args()
    rows = [json.loads(line) for path in arguments.results for line in path.read_text().splitlines()]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        print(f"\n## {task}\n")
        own = with_shares([row for row in rows if row["task"] == task])
        (print_summary if arguments.summary else print_task)(own)
    if arguments.plot is not None:
        draw(arguments.plot, {task: with_shares([row for row in rows if row["task"] == task]) for task in tasks})


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Add `share` to the rows of one task, from the original and the direct LoRA of the same seed."""
    before = {row["seed"]: row["loss"] for row in rows if row["row"] == "original"}
    direct = {row["seed"]: row["loss"] for row in rows if row["row"] == "direct"}
    return [
        {**row, "share": (before[row["seed"]] - row["loss"]) / (before[row["seed"]] - direct[row["seed"]])}
        for row in rows
        if row["seed"] in direct
    ]


def print_task(rows: Sequence[Row]) -> None:
    """Make one table of methods and one of exact steps."""
    for name in ("original", "direct"):
        own = [row for row in rows if row["row"] == name]
        print(f"{name}: loss {_mean(own, 'loss'):.4f}, accuracy {_mean(own, 'accuracy'):.4f}, {len(own)} seeds")
    print("\n| kind | size | bytes MB | seeds | " + " | ".join(STAGES) + " | s/step | peak MB |")
    print("|---" * (6 + len(STAGES)) + "|")
    plain = [row for row in rows if row["kind"] != "direct" and not row.get("polished")]
    for kind, size in _cells(plain):
        own = [row for row in plain if (row["kind"], row["size"]) == (kind, size)]
        stages = " | ".join(_cell([row for row in own if row["row"] == stage]) for stage in STAGES)
        seeds = len({row["seed"] for row in own})
        print(
            f"| {kind} | {size:g} | {own[0]['bytes'] / 1e6:.2f} | {seeds} | {stages} | "
            f"{_mean(own, 'step_seconds'):.2f} | {_mean(own, 'train_peak_bytes') / 1e6:.0f} |"
        )
    polished = [row for row in rows if row.get("polished")]
    for kind, size in _cells(polished):
        own = [row for row in polished if (row["kind"], row["size"]) == (kind, size)]
        names = dict.fromkeys(row["row"] for row in own)
        print(f"\n{kind}:{size:g}, exact steps, {len({row['seed'] for row in own})} seeds")
        for name in names:
            print(f"  {name:24} {_cell([row for row in own if row['row'] == name])}")


def print_summary(rows: Sequence[Row]) -> None:
    """Write shares on the original, as each kind is used, and after exact steps, in Markdown."""
    rows = sorted(rows, key=lambda row: KINDS.index(row["kind"]) if row["kind"] in KINDS else len(KINDS))
    plain = [row for row in rows if not row.get("polished") and row["row"] == _judged(row["kind"])]
    _print_grid("emulator", plain, lambda row: f"{row['kind']}, {row['row']}")
    polished = {(row["kind"], row["size"]) for row in rows if row.get("polished")}
    starts = [row for row in rows if (row["kind"], row["size"]) in polished and row["row"] not in STAGES[:2]]
    if starts:
        _print_grid("exact steps", starts, lambda row: f"{row['kind']}, {row['row']}")


def _judged(kind: str) -> str:
    return JUDGED.get(kind, STAGES[-1])


def _print_grid(title: str, rows: Sequence[Row], line_of: Callable[[Row], str]) -> None:
    """Make a table with lines by `line_of` and sizes as columns; cells with fewer seeds show their number."""
    sizes = sorted({row["size"] for row in rows}, reverse=True)
    seeds = len({row["seed"] for row in rows})
    print(f"\n| {title} | " + " | ".join(f"{size:g}" for size in sizes) + f" |\n|{'---|' * (len(sizes) + 1)}")
    for line in dict.fromkeys(map(line_of, rows)):
        cells = [[row for row in rows if (line_of(row), row["size"]) == (line, size)] for size in sizes]
        print(f"| {line} | " + " | ".join(_share(cell, seeds) for cell in cells) + " |")


def _share(rows: Sequence[Row], seeds: int) -> str:
    if not rows:
        return ""
    shares = [100 * row["share"] for row in rows]
    spread = f" ± {stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{mean(shares):.1f}{spread} %" + ("" if len(rows) == seeds else f" (seeds: {len(rows)})")


def _cells(rows: Sequence[Row]) -> list[tuple[str, float]]:
    return sorted({(row["kind"], row["size"]) for row in rows}, key=lambda cell: (-cell[1], cell[0]))


def _mean(rows: Iterable[Row], field: str) -> float:
    return mean(float(row[field]) for row in rows)


def _cell(rows: Sequence[Row]) -> str:
    """Format loss, accuracy and share with its spread; a dash if the stage does not exist."""
    if not rows:
        return "-"
    shares = [row["share"] for row in rows]
    spread = f" +- {stdev(shares):.1%}" if len(shares) > 1 else ""
    return f"{_mean(rows, 'loss'):.4f} ({_mean(rows, 'accuracy'):.3f}) {mean(shares):.1%}{spread}"


def draw(file: Path, tasks: dict[str, list[Row]]) -> None:
    """Draw the share of the direct gain on the original against bytes of the emulator's linears, a panel per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(tasks), 4.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    colors = {kind: f"C{number}" for number, kind in enumerate(KINDS)}
    drawn: dict[str, Any] = {}
    for axes, (task, rows) in zip(panels, tasks.items(), strict=True):
        found = [row for row in rows if not row.get("polished")]
        for kind in KINDS:
            stage = _judged(kind)
            points = {
                size: [row["share"] for row in found if (row["kind"], row["size"], row["row"]) == (kind, size, stage)]
                for size in sorted({row["size"] for row in found if row["kind"] == kind})
            }
            points = {size: shares for size, shares in points.items() if shares}
            sizes = {row["size"]: row["bytes"] for row in found if row["kind"] == kind and "bytes" in row}
            if not points:
                continue
            drawn[f"{kind}, {stage}"] = axes.errorbar(
                [sizes[size] / 1e6 for size in points],
                [100 * mean(shares) for shares in points.values()],
                [100 * stdev(shares) if len(shares) > 1 else 0 for shares in points.values()],
                marker="o", markersize=4, capsize=3, color=colors[kind],
            )  # fmt: skip
        axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="bytes of the emulator's linears, MB", title=task)
        axes.set_ylabel("share of direct LoRA's gain, %")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend([*drawn.values()], [*drawn], loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
