"""Writes a finished run as one self-contained HTML page: it fetches nothing and runs no script.

It is readable from a phone's width up: charts scale, and wide tables scroll in their own box.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from onelayer.compiler.storage.files import write_text
from onelayer.runtime.reporting.run_figures import ReportData
from onelayer.runtime.reporting.svg_charts import bars, lines
from onelayer.runtime.sizes import broken_promise, size

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 60rem;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top;
         overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; overflow-wrap: normal; }
svg.chart { width: 100%; max-width: 620px; height: auto; display: block; }
ul.legend { list-style: none; padding: 0; margin: .3rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
            font-size: .85rem; }
.failed { color: #b00020; font-weight: 600; } .note { color: #555; font-size: .9rem; }
"""


def write_report(
    file: Path, manifest: Path, document: Mapping[str, Any], data: ReportData, budget_bytes: int | None
) -> None:
    """Write the page. `document` is the run's own JSON: `steps` and `evaluations`."""
    title = f"onelayer: {manifest.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_summary(document, data))}</p>',
        _section("Pipeline", _pipeline(document, data)),
        _section("Held-out scores", _scores(document["evaluations"])),
        _section("Memory against budget", _memory(data, budget_bytes)),
        _section("Error by layer", _errors(data) + _units(data)),
        _section("Training", _curves(data)),
        _section("Use it", _commands(manifest, data)),
        _section("The manifest", f"<pre>{escape(manifest.read_text(encoding='utf-8'))}</pre>"),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f"{head}{''.join(sections)}</body></html>\n")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _summary(document: Mapping[str, Any], data: ReportData) -> str:
    states = [row["state"] for row in document["steps"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    seconds = sum(step.seconds for step in data.steps)
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    return f"{len(states)} steps: {counts}. Making all of it takes {seconds:.0f} s. {versions}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """Format a table in its own box; the columns in `numbers` are right-aligned."""
    style = ['class="number"' if column in numbers else "" for column in range(len(head))]
    cells = "".join(f"<th {style[column]}>{escape(name)}</th>" for column, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td {style[column]}>{_cell(value)}</td>" for column, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value in ("failed", "skipped"):
        return f'<span class="failed">{value}</span>'
    return escape("" if value is None else str(value))


def _pipeline(document: Mapping[str, Any], data: ReportData) -> str:
    facts = {step.name: step for step in data.steps}
    rows = []
    for row in document["steps"]:
        step = facts.get(row["name"])
        known: tuple[str, ...] = ("",) * 4
        if step is not None:
            known = (step.key[:12], step.digest[:12], f"{step.seconds:.1f}", size(step.total_bytes))
        rows.append((row["name"], row["state"], *known, row["reason"]))
    return table(("step", "state", "key", "digest", "seconds", "size", "why"), rows, numbers=(4, 5))


def _scores(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for task, scores in evaluations.items():
        rows = [(row["name"], row["loss"], row["perplexity"], row["token_accuracy"], row["tokens"]) for row in scores]
        head = ("model", "loss", "perplexity", "token accuracy", "tokens")
        parts.append(f"<h3>{escape(task)}</h3>" + table(head, rows, numbers=(1, 2, 3, 4)))
    return "".join(parts) and "".join(parts) + '<p class="note">Loss in nats per labeled token; lower is better.</p>'


def _memory(data: ReportData, budget_bytes: int | None) -> str:
    rows = [(row.step, [1024 * (row.promised_gib or 0.0), 1024 * row.measured_gib]) for row in data.memory]
    limit = None if budget_bytes is None else budget_bytes / (1 << 20)
    chart = bars(rows, ("predicted", "measured"), "peak device memory, MiB", limit)
    note = "The budget is the manifest's <code>emulator.memory</code>." if limit is not None else "No budget was set."
    marks = [(row.step, broken_promise(row.measured_bytes, row.promised_bytes)) for row in data.memory]
    broken = "".join(f'<p class="failed">{escape(step)}: {escape(text)}</p>' for step, text in marks if text)
    explained = f'<p class="note">{note} On a CPU the measured value is the growth of the process.</p>'
    return chart and chart + broken + explained


def _errors(data: ReportData) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(data.errors, key=lambda row: row.layer):
        series.setdefault(row.kind, []).append((float(row.layer), row.error))
    chart = lines(series, "layer", "relative error of the output")
    return chart and f'{chart}<p class="note">For each linear of the emulator, over the calibration rows.</p>'


def _units(data: ReportData) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    several = len({row.step for row in data.units}) > 1
    for row in sorted(data.units, key=lambda row: row.layer):
        label = [*([row.step] if several else []), row.kind]
        for when, error in (("as compiled", row.before), ("refined", row.after)):
            series.setdefault(", ".join([*label, when]), []).append((float(row.layer), error))
    chart = lines(series, "layer", "relative error of the output")
    note = "For each layer of the emulator, given the original's inputs, over the rows that it was refined on."
    return chart and f'{chart}<p class="note">{note}</p>'


def _curves(data: ReportData) -> str:
    return lines(data.curves, "step", "training loss")


_LOAD = {
    "model": "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({path!r})",
    "adapter": "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained({path!r})",
}


def _commands(manifest: Path, data: ReportData) -> str:
    parts = [f"<p>Reproduce it:</p><pre>onelayer run {escape(str(manifest))}</pre>"]
    for row in data.loadable:
        code = _LOAD[row.loader].format(path=escape(row.path))
        parts.append(f"<p>Load <code>{escape(row.step)}</code>:</p><pre>{code}</pre>")
    return "".join(parts)
