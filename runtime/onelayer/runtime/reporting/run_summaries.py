"""Turns a plan's document into text."""

from collections.abc import Collection, Mapping
from typing import Any

from onelayer.runtime.reporting.tables import scores, table
from onelayer.runtime.sizes import broken_promise, size


def plan_summary(document: Mapping[str, Any]) -> str:
    """Format what fits, what it costs, what limits it and what could be given up."""
    memory, predicted = document["memory_bytes"], document["predicted"]
    settings = f"batches of {document['batch_size']} x {document['max_length']} tokens"
    if (positions := document.get("positions")) is not None:
        settings = f"a picture with its prompt at a time, {positions} positions"
    if document["fits"]:
        stored = document["activations"]
        how = "stored whole" if stored == "none" else f"compressed, {stored} at rank {document['activation_rank']}"
        dtype, ratio = document["factor_dtype"], document["ratio"]
        kept = f"all weights in {dtype}" if ratio == 1 else f"ratio {ratio} of {dtype} factors"
        if document["form"] == "coded":
            kept = f"codes at {document['keep_bytes']} of the bytes"
        head = f"{document['model']}: fits in {size(memory)} with {kept}, activations {how}; {settings}"
    else:
        head = f"{document['model']}: does not fit in {size(memory)}; {settings}"
    passes = [("predicted", "device peak"), *((name, size(predicted[f"{name}_bytes"])) for name in _PASSES)]
    parts = document["train_parts"]
    made_of = ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in parts.items())
    lines = [
        head,
        "",
        table(passes),
        f"training is made of: {made_of}",
        f"emulator {size(predicted['emulator_bytes'])}, original {size(predicted['model_bytes'])}, "
        f"host {size(predicted['host_bytes'])}, disk {size(predicted['disk_bytes'])}, "
        f"read per pass {size(predicted['read_bytes'])}",
        f"limited by {document['limit']}",
    ]
    if (media := document["media"]) is not None:
        shown = f", {media['tokens']} tokens of the text" if media["tokens"] else ""
        lines.append(f"an example has {media['count']} of images or sound: {media['rows']} rows of a tower{shown} each")
    lines += [f"give up: {row['give_up']} allows {_larger(document, row['ratio'])}" for row in document["give_up"]]
    lines += ["", _choices(document)]
    if document["seconds"]:
        speed = document["speed"]
        rows = [
            ("rough seconds", ""),
            *((name.replace("_", " "), value) for name, value in document["seconds"].items()),
        ]
        lines += ["", table(rows)]
        lines.append(
            f"at {size(int(speed['read_bytes_per_second']))}/s from disk and "
            f"{speed['flops_per_second'] / 1e12:.3g} TFLOP/s on {speed['device']}"
        )
    anchored = [(row["every"], *_anchor_cells(row)) for row in document["anchored"]]
    lines += ["", table([("anchor every", "seconds a step", "read a step", "offsets", "peak"), *anchored])]
    lines += ["", _ways(document)]
    if (choice := document["anchor_choice"]) is not None:
        lines.append(_anchored_run(choice))
    return "\n".join([*lines, *(f"note: {remark}" for remark in document["remarks"])])


def _ways(document: Mapping[str, Any]) -> str:
    """Format the ways to train, and name the fastest that fits."""
    rows = [
        (
            row["way"],
            "yes" if row["fits"] else "no",
            *(size(row[name]) for name in ("peak_bytes", "read_bytes_per_step", "cache_bytes")),
            row["seconds_per_step"],
            row["once_seconds"],
        )
        for row in document["ways"]
    ]
    head = ("way to train", "fits", "peak", "read a step", "--cache", "seconds a step", "seconds once")
    named = "" if document["fastest"] is None else f"\nfastest that fits: {document['fastest']}"
    return table([head, *rows]) + named


def _anchored_run(choice: Mapping[str, Any]) -> str:
    """Format the number of steps between renewals that fits into the given time."""
    run = f"{choice['steps']} steps take about {choice['seconds'] / 3600:.2g} h"
    if choice["every"] is None:
        return f"{run} without anchors, and no anchors fit into {choice['limit_seconds'] / 3600:g} h"
    return f"{run} with --anchor-every {choice['every']}"


def _anchor_cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    sizes = (size(row[name]) for name in ("read_bytes_per_step", "offset_bytes", "peak_bytes"))
    return row["seconds_per_step"], *sizes


def _larger(document: Mapping[str, Any], ratio: float) -> str:
    """Format a larger ratio as the choice's own is formatted."""
    if document["keep_bytes"] is None:
        return f"ratio {ratio}"
    return f"{document['keep_bytes'] * ratio / document['ratio']:.4f} of the bytes"


_PASSES = ("compile", "refine", "train", "correct")


def _choices(document: Mapping[str, Any]) -> str:
    head = ("linears", "largest ratio", "middle rank", "emulator", "train peak", "error left out")
    rows = [
        (
            "codes" if row["form"] == "coded" else row["factor_dtype"],
            row["ratio"] if row["keep_bytes"] is None else f"{row['keep_bytes']} of the bytes",
            row["rank"],
            size(row["emulator_bytes"]),
            size(row["train_bytes"]),
            None if row["error"] is None else f"{'<' if row['error_is_bound'] else ''}{row['error']}",
        )
        for row in document["choices"]
    ]
    return table([head, *rows])


def plan_steps_summary(document: Mapping[str, Any]) -> str:
    """Format the steps with their states, predicted bytes and peaks, and reasons."""
    head = ("step", "state", "reads", "writes", "device peak", "why")
    rows = [
        (row["name"], row["state"], *(_size(row[f"{name}_bytes"]) for name in ("read", "write", "peak")), row["reason"])
        for row in document["steps"]
    ]
    to_run = [row for row in document["steps"] if row["state"] == "to run"]
    total = f"{len(to_run)} of {len(rows)} steps to run"
    note = "" if document["note"] is None else f"\nnote: {document['note']}"
    return f"{table([head, *rows])}\n{total}; bytes and peaks are predictions{note}"


def _size(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else size(size_bytes)


def run_summary(document: Mapping[str, Any], products: Collection[str]) -> str:
    """Format the steps with their reasons, the scores of every task, and the paths of results (kinds `products`)."""
    steps = [("step", "state", "why"), *((row["name"], row["state"], row["reason"]) for row in document["steps"])]
    parts = [table(steps)]
    broken = {
        row["name"]: broken_promise(row["peak_device_bytes"], row["promised_bytes"])
        for row in document["steps"]
        if row["peak_device_bytes"] is not None
    }
    parts.append("\n".join(f"{name}: {text}" for name, text in broken.items() if text))
    for task, rows in document["evaluations"].items():
        parts.append(f"{task}\n{scores([(row['name'], row) for row in rows])}")
    results = [row for row in document["steps"] if row["kind"] in products and row["state"] in ("cached", "ran")]
    parts.append("\n".join(f"{row['name']}: {row['path']}" for row in results))
    parts.append(f"report: {document['report']}")
    return "\n\n".join(part for part in parts if part)
