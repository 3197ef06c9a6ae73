"""What a polish did, as text for a person: step by step, with the held-out loss where there is one."""

from collections.abc import Mapping
from typing import Any

from onelayer.runtime.cli_format import report_line, size, table


def polish_summary(document: Mapping[str, Any]) -> str:
    """One row per step, which adapter was taken, and what it cost."""
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
