"""Formats plain-text tables and values for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from onelayer.runtime.sizes import broken_promise, size

# An allocator that keeps so many times what it hands out wastes a card.
MOST_RESERVED = 1.5


def table(rows: Sequence[Sequence[object]]) -> str:
    """Format rows of cells as aligned columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(name: str, value: object) -> object:
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else value


def summary(document: Mapping[str, Any]) -> str:
    """Format every plain value of a document with its name, one level of nesting unfolded, lists counted.

    The report of a pass that broke its promise is marked.
    """
    rows: list[tuple[str, object]] = []
    for name, value in document.items():
        if isinstance(value, Mapping):
            if {"largest_unit_bytes", "workspace_bytes", "peak_device_bytes"} <= value.keys():
                rows += [(name, broken)] if (broken := _broken(value)) else []
            inner = [(f"{name}.{key}", _value(key, item)) for key, item in value.items()]
            rows += [(label, item) for label, item in inner if not isinstance(item, Mapping | list)]
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value)) if _is_short(value) else f"{len(value)} entries"))
        else:
            rows.append((name, _value(name, value)))
    return table(rows) if rows else "nothing to show"


def _is_short(values: list[Any]) -> bool:
    return len(values) <= 8 and all(isinstance(value, str | int | float) for value in values)


def scores(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Format one row of figures per model, by name."""
    if all(row["perplexity"] is None for _, row in rows):  # denoisers
        names = ("loss", "class_loss", "velocity_drift", "tokens")
        heads = ("", "loss", "class loss", "velocity drift", "images")
        return table([heads, *((name, *(row.get(field) for field in names)) for name, row in rows)])
    head = ("", "loss", "perplexity", "token accuracy", "tokens")
    body = [(name, row["loss"], row["perplexity"], row["token_accuracy"], row["tokens"]) for name, row in rows]
    lines: list[tuple[Any, ...]] = [head, *body]
    for share, count in (("choice_accuracy", "questions"), ("preference_accuracy", "preferences")):
        if any(row.get(count) for _, row in rows):
            answers = [(share.replace("_", " "), count), *((row.get(share), row.get(count)) for _, row in rows)]
            lines = [(*left, *right) for left, right in zip(lines, answers, strict=True)]
    return table(lines)


def report_line(report: Mapping[str, Any]) -> str:
    """Format the memory contract in one line: what was measured and what was promised; a broken promise in another."""
    promised = report["largest_unit_bytes"] + report["workspace_bytes"]
    broken, reserved = _broken(report), report.get("reserved_device_bytes")
    return "\n".join(
        part
        for part in (
            broken,
            f"device peak {size(report['peak_device_bytes'])} "
            f"(largest unit {size(report['largest_unit_bytes'])} + workspace = {size(promised)}), "
            + ("" if reserved is None else f"{size(reserved)} reserved, ")
            + f"host peak {size(report['peak_host_bytes'])}, read {size(report['bytes_read'])}, "
            f"{report['seconds']:.1f} s",
            _advice(report["peak_device_bytes"], reserved),
        )
        if part
    )


def _advice(peak_bytes: int, reserved_bytes: int | None) -> str:
    """Advise, against an allocator that keeps much more of a device than it hands out."""
    if reserved_bytes is None or reserved_bytes < MOST_RESERVED * peak_bytes:
        return ""
    return "the allocator reserves much more than it hands out; set PYTORCH_ALLOC_CONF=expandable_segments:True"


def _broken(report: Mapping[str, Any]) -> str:
    return broken_promise(report["peak_device_bytes"], report["largest_unit_bytes"] + report["workspace_bytes"])


def age(seconds: float) -> str:
    """Format a duration in the largest unit that it holds at least twice."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
