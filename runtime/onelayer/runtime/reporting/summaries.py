"""Formats result documents as plain text: short aligned tables that fit a terminal and read well in a log."""

from collections.abc import Mapping, Sequence
from typing import Any

from onelayer.runtime.reporting.tables import age, report_line, scores, summary, table
from onelayer.runtime.sizes import size

WORST_LINEARS = 5


def inspect_summary(document: Mapping[str, Any]) -> str:
    """Describe a directory; for an emulator also the rank and error of every linear and stack of experts.

    For a refined emulator the errors of its layers replace those of its linears.
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


def compile_summary(document: Mapping[str, Any]) -> str:
    """Format the sizes, the linears and expert stacks with the largest errors, the experts left dense, and the cost."""
    before, after = document["parameters_before"], document["parameters_after"]
    dtype = document["factor_dtype"] or "the original's dtype"
    coded = next((row for row in document["linears"] if row["form"] == "coded"), None)
    form = f"ratio {document['ratio']:.4g}, factors"
    if coded is not None:
        form = f"codes of {coded['code_bits']} bits for {coded['code_width']} neighbors, factors"
    head = (
        f"{document['output']}: {after:,} of {before:,} parameters ({after / before:.1%}), "
        f"{document['kept_bytes_share']:.1%} of the layers' bytes at 16 bits\n"
        f"{form} in {dtype}, ranks {document['rank_allocation']}"
    )
    stacks, dense = document["stacks"], document["layer_parameters_stacked"]
    worst = sorted([*document["linears"], *stacks], key=lambda linear: linear["error"], reverse=True)[:WORST_LINEARS]
    rows = [("largest errors", "rank", "error", "optimal")]
    rows += [(row["name"], row["rank"], row["error"], row["optimal_error"]) for row in worst]
    remarks = []
    if stacks:
        experts, fallbacks = (sum(row[field] for row in stacks) for field in ("experts", "fallbacks"))
        matrices = f"{experts} expert matrices in {len(stacks)} stacks"
        remarks.append(f"{matrices}, {fallbacks} of them completed by a fallback")
    if again := sum(row.get("float64_solves", 0) for row in [*document["linears"], *stacks]):
        remarks.append(f"{again} matrices were solved again in float64: float32 did not certify their accuracy")
    if dense:
        remarks.append(
            f"{dense:,} expert parameters stay dense: their class does not support transformers' experts interface"
        )
    return "\n".join([head, *([table(rows)] if worst else []), *remarks, report_line(document["report"])])


def refine_summary(document: Mapping[str, Any]) -> str:
    """Format the layers furthest from the original's, before and after, and the cost."""
    units = sorted(document["units"], key=lambda unit: unit["after"], reverse=True)
    rows = [("largest errors of layers", "before", "after")]
    rows += [(unit["name"], unit["before"], unit["after"]) for unit in units[:WORST_LINEARS]]
    better = sum(unit["after"] < unit["before"] for unit in units)
    head = f"{document['output']}: {better} of {len(units)} layers are closer to the original's"
    return "\n".join([head, table(rows), report_line(document["report"])])


def correct_summary(document: Mapping[str, Any]) -> str:
    """Format the adapter's path, how much was corrected, and the cost."""
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
    """Format one row per scored model."""
    rows = [(row["adapter"] or "original", row) for row in document["results"]]
    parts = [scores(rows), report_line(document["report"])]
    if against := document["against"]:
        known = [(name, value) for name, value in against.items() if value is not None]
        parts.insert(1, f"against the original\n{table(known)}")
    return "\n".join(parts)


def artifacts(document: Sequence[Mapping[str, Any]]) -> str:
    """Format one row per artifact, with its last users, and the total."""
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


def faults(document: Sequence[Mapping[str, Any]]) -> str:
    """Format one line per damaged file."""
    lines = [f"{row['key'][:12]} ({row['kind']}): {row['file']} {row['problem']}" for row in document]
    return "\n".join(lines) or "every file is as it was written"


def pruned(document: Mapping[str, Any]) -> str:
    """Format what was removed, what stayed because it is in use, and the freed bytes."""
    verb = "would be removed" if document["dry_run"] else "removed"
    lines = [f"{len(document['removed'])} artifacts {verb}, {size(document['freed_bytes'])}"]
    lines += [
        f"{row['key'][:12]} {row['kind'] or 'unfinished'}, {size(row['size_bytes'])}, last used "
        f"{age(row['unused_seconds'])} ago"
        for row in document["artifacts"]
    ]
    lines += [f"{key[:12]} is in use and stays" for key in document["in_use"]]
    return "\n".join(lines)


def polish_summary(document: Mapping[str, Any]) -> str:
    """Format one row per step, which adapter was chosen, and the cost."""
    held_out = {item["step"]: item["loss"] for item in document["held_out"]}
    rows: list[tuple[object, ...]] = [("step", "batch loss", "held-out loss", "gradient norm", "seconds", "read")]
    for number, step in enumerate(document["steps"]):
        cost = (step["gradient_norm"], step["seconds"], size(step["bytes_read"]))
        rows.append((number + 1, step["loss"], held_out.get(number), *cost))
    last = len(document["steps"])
    if last in held_out:
        rows.append(("after", None, held_out[last], None, None, None))
    parts = [f"{document['output']}: {last} exact steps, losses before each", table(rows)]
    if held_out:
        parts.append(f"written: the adapter after {document['chosen_step']} steps, the best on held-out data")
    if document["gradient_cosine"] is not None:
        parts.append(f"layer inputs compressed: cosine {document['gradient_cosine']:.4f} to the exact gradient")
    parts.append(
        f"layer inputs kept: {size(document['kept_bytes'])} of host memory, {size(document['spilled_bytes'])} in files"
    )
    return "\n".join([*parts, report_line(document["report"])])


def train_summary(document: Mapping[str, Any]) -> str:
    """Format the values of a training, and its sample pictures with their cost."""
    samples = document["samples"]
    plain = summary({name: value for name, value in document.items() if name != "samples"})
    return plain if samples is None else f"{plain}\n\n{sample_summary(samples)}"


def sample_summary(document: Mapping[str, Any]) -> str:
    """Format one row per sample picture, and the cost."""
    rows = [(f"{document['output']}/{picture['file']}", picture["prompt"]) for picture in document["pictures"]]
    return "\n".join([table([("picture", "prompt"), *rows]), report_line(document["report"])])
