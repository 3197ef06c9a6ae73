"""A run or its plan in, text for a person out: the steps, what they cost, why they run, and the scores of each task."""

from collections.abc import Mapping
from typing import Any

from onelayer.runtime.cli_format import scores, size, table


def plan_steps_summary(document: Mapping[str, Any]) -> str:
    """The steps with their states, predicted bytes and peaks, and reasons."""
    head = ("step", "state", "reads", "writes", "device peak", "why")
    rows = [
        (row["name"], row["state"], *(_size(row[f"{name}_bytes"]) for name in ("read", "write", "peak")), row["reason"])
        for row in document["steps"]
    ]
    to_run = [row for row in document["steps"] if row["state"] == "to run"]
    total = f"{len(to_run)} of {len(rows)} steps to run"
    return f"{table([head, *rows])}\n{total}; bytes and peaks are predictions"


def _size(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else size(size_bytes)


def run_summary(document: Mapping[str, Any]) -> str:
    """The steps with their states and reasons, then the scores of every task, and where things lie."""
    steps = [("step", "state", "why"), *((row["name"], row["state"], row["reason"]) for row in document["steps"])]
    parts = [table(steps)]
    for task, rows in document["evaluations"].items():
        parts.append(f"{task}\n{scores([(row['name'], row) for row in rows])}")
    parts.append("\n".join(f"{row['name']}: {row['path']}" for row in document["steps"] if _is_product(row)))
    parts.append(f"report: {document['report']}")
    return "\n\n".join(part for part in parts if part)


def _is_product(row: Mapping[str, Any]) -> bool:
    """Whether a step leaves what people came for."""
    return row["kind"] in ("correct", "polish", "merge") and row["state"] in ("cached", "ran")
