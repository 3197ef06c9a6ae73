"""Result documents in, plain text for a person out: short aligned tables that fit a terminal and read well in a log."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

WORST_LINEARS = 5


def print_result(work: Callable[[], Any], summary: Callable[[Any], str], as_json: bool) -> Any:
    """Do the work and print its result; what libraries print meanwhile goes to stderr, stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work()
        document = result if isinstance(result, dict | list) else result.model_dump(mode="json")
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else summary(document))
    return result


def print_error(text: str) -> None:
    """One line on stderr."""
    typer.echo(f"onelayer: error: {' '.join(text.split())}", err=True)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned columns."""
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


def size(size_bytes: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"


def _value(name: str, value: object) -> object:
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else value


def summary(document: Mapping[str, Any]) -> str:
    """Every plain value of a document under its name, one level of nesting unfolded, lists counted."""
    rows: list[tuple[str, object]] = []
    for name, value in document.items():
        if isinstance(value, Mapping):
            inner = [(f"{name}.{key}", _value(key, item)) for key, item in value.items()]
            rows += [(label, item) for label, item in inner if not isinstance(item, Mapping | list)]
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value)) if _is_short(value) else f"{len(value)} entries"))
        else:
            rows.append((name, _value(name, value)))
    return table(rows) if rows else "nothing to show"


def inspect_summary(document: Mapping[str, Any]) -> str:
    """What a directory is; of an emulator also the rank and error of every linear and stack of experts.

    A refined one tells the errors of its layers in place of its linears'.
    """
    if document["kind"] != "emulator":
        return summary(document)
    rows: list[tuple[object, ...]] = [("linear", "rank", "error", "optimal", "remark")]
    stacks = document.get("stacks", [])
    for row in [*document["linears"], *stacks]:
        errors = (row.get("error", ""), row.get("optimal_error", ""))
        rows.append((row["name"], row["rank"], *errors, row["fallback"] or ""))
    rows += [(row["name"], "dense", 0.0, 0.0, row["reason"]) for row in document["dense"]]
    head = {name: value for name, value in document.items() if name not in ("linears", "stacks", "dense")}
    units = document.get("refined", {}).get("units", [])
    layers = [("layer", "as compiled", "refined"), *((unit["name"], unit["before"], unit["after"]) for unit in units)]
    return "\n\n".join([summary(head), *([table(layers)] if units else []), table(rows)])


def _is_short(values: list[Any]) -> bool:
    return len(values) <= 8 and all(isinstance(value, str | int | float) for value in values)


def compile_summary(document: Mapping[str, Any]) -> str:
    """The sizes, the linears and stacks of experts that lost most, what stayed dense of experts, and what it cost."""
    before, after = document["parameters_before"], document["parameters_after"]
    dtype = document["factor_dtype"] or "the original's dtype"
    head = (
        f"{document['output']}: {after:,} of {before:,} parameters ({after / before:.1%}), "
        f"{document['kept_bytes_share']:.1%} of the layers' bytes at 16 bits\n"
        f"ratio {document['ratio']:.4g}, factors in {dtype}, ranks {document['rank_allocation']}"
    )
    stacks, dense = document["stacks"], document["layer_parameters_stacked"]
    worst = sorted([*document["linears"], *stacks], key=lambda linear: linear["error"], reverse=True)[:WORST_LINEARS]
    rows = [("largest errors", "rank", "error", "optimal")]
    rows += [(row["name"], row["rank"], row["error"], row["optimal_error"]) for row in worst]
    told = []
    if stacks:
        experts, fallbacks = (sum(row[field] for row in stacks) for field in ("experts", "fallbacks"))
        told.append(f"{experts} expert matrices in {len(stacks)} stacks, {fallbacks} of them completed by a fallback")
    if dense:
        told.append(f"{dense:,} parameters of experts out of reach of transformers' experts interface stay dense")
    return "\n".join([head, *([table(rows)] if worst else []), *told, report_line(document["report"])])


def refine_summary(document: Mapping[str, Any]) -> str:
    """The layers that are furthest from the original's, before and after, and what it cost."""
    units = sorted(document["units"], key=lambda unit: unit["after"], reverse=True)
    rows = [("largest errors of layers", "before", "after")]
    rows += [(unit["name"], unit["before"], unit["after"]) for unit in units[:WORST_LINEARS]]
    better = sum(unit["after"] < unit["before"] for unit in units)
    head = f"{document['output']}: {better} of {len(units)} layers came closer to the original's"
    return "\n".join([head, table(rows), report_line(document["report"])])


def correct_summary(document: Mapping[str, Any]) -> str:
    """Where the adapter is, how much was corrected, and what it cost."""
    limit = "none" if document["limit"] is None else document["limit"]
    how = f"limit {limit}, {document['solver']} solver, scale {document['scale']}"
    parts = [f"{document['output']}: {len(document['linears'])} linears corrected, {how}"]
    if document["candidates"]:
        tried = document["candidates"]
        rows = [
            (row["solver"], "none" if row["limit"] is None else row["limit"], row["scale"], row["loss"])
            for row in tried
        ]
        parts.append(table([("solver tried", "limit", "scale", "held-out loss"), *rows]))
    return "\n".join([*parts, report_line(document["report"])])


def evaluate_summary(document: Mapping[str, Any]) -> str:
    """One row per model scored."""
    rows = [(row["adapter"] or "original", row) for row in document["results"]]
    parts = [scores(rows), report_line(document["report"])]
    if against := document["against"]:
        parts.insert(1, f"against the original\n{table([*against.items()])}")
    return "\n".join(parts)


def scores(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """One row of figures per model, by name."""
    head = ("", "loss", "perplexity", "token accuracy", "tokens")
    body = [(name, row["loss"], row["perplexity"], row["token_accuracy"], row["tokens"]) for name, row in rows]
    if not any(row.get("questions") for _, row in rows):
        return table([head, *body])
    answers = [("choice accuracy", "questions"), *((row["choice_accuracy"], row["questions"]) for _, row in rows)]
    return table([(*left, *right) for left, right in zip([head, *body], answers, strict=True)])


def report_line(report: Mapping[str, Any]) -> str:
    """The memory contract in one line: what was measured beside what was promised."""
    promised = report["largest_unit_bytes"] + report["workspace_bytes"]
    return (
        f"device peak {size(report['peak_device_bytes'])} "
        f"(largest unit {size(report['largest_unit_bytes'])} + workspace = {size(promised)}), "
        f"host peak {size(report['peak_host_bytes'])}, read {size(report['bytes_read'])}, {report['seconds']:.1f} s"
    )


def artifacts(document: Sequence[Mapping[str, Any]]) -> str:
    """One row per artifact, with those who used it last, and the total."""
    rows = [
        (row["key"][:12], row["kind"], size(row["total_bytes"]), age(row["age_seconds"]), ", ".join(row["used_by"]))
        for row in document
    ]
    if not rows:
        return "the store is empty"
    total = f"{len(document)} artifacts, {size(sum(row['total_bytes'] for row in document))}"
    return (
        "\n".join([table([("key", "kind", "size", "age", "used by"), *rows]), total]) if rows else "the store is empty"
    )


def age(seconds: float) -> str:
    """A duration in the largest unit of which there are two."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def faults(document: Sequence[Mapping[str, Any]]) -> str:
    """One line per damaged file."""
    lines = [f"{row['key'][:12]} ({row['kind']}): {row['file']} {row['problem']}" for row in document]
    return "\n".join(lines) or "every file is as it was written"


def pruned(document: Mapping[str, Any]) -> str:
    """What went, what stayed because it is in use, and the bytes."""
    verb = "would be removed" if document["dry_run"] else "removed"
    lines = [f"{len(document['removed'])} artifacts {verb}, {size(document['freed_bytes'])}"]
    lines += [f"{key[:12]} is in use and stays" for key in document["in_use"]]
    return "\n".join(lines)
