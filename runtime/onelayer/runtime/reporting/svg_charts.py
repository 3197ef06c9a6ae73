"""Draws small SVG charts as text: lines and bars with axes, labels and a legend. No library, no network."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 42
# Okabe and Ito: distinct for people who see colors differently; dashes keep lines distinct in print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#000000")
DASHES = ("", "6 3", "2 3")

Points = Sequence[tuple[float, float]]
Rows = Sequence[tuple[str, Sequence[float]]]


def lines(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Draw one line per series over common axes, with a legend below; y starts at zero if the values come near it."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points if math.isfinite(y)]
    low, high = min(ys), max(ys)
    low = 0.0 if low >= 0 and low < 0.5 * high else low
    scale = _Scale(min(xs), max(xs), low, high)
    parts = [_axes(scale, x_label, y_label)]
    for index, points in enumerate(series.values()):
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points if math.isfinite(y))
        parts.append(f'<polyline fill="none" {_stroke(index)} points="{path}"/>')
        if len(points) == 1:
            (x, y), color = points[0], COLORS[index % len(COLORS)]
            parts.append(f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3" fill="{color}"/>')
    return _svg("".join(parts), f"{y_label} over {x_label}") + _legend(list(series))


def bars(
    rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str, limit: float | None = None
) -> str:
    """Draw groups of horizontal bars, one bar per name in each row, and `limit` as a vertical line."""
    if not rows:
        return ""
    largest = max([limit or 0.0, *(value for _, values in rows for value in values)]) or 1.0
    thick, gap, head = 11, 8, 15
    group = head + thick * len(names) + gap
    height = TOP + group * len(rows) + 30
    right = WIDTH - 74  # room for the figures after the bars
    parts = []
    for number, (label, values) in enumerate(rows):
        top = TOP + number * group
        parts.append(f'<text x="4" y="{top + 9}">{escape(label)}</text>')
        for index, value in enumerate(values):
            y, width = top + head + index * thick, max(1.0, right * value / largest)
            parts.append(f'<rect x="4" y="{y}" width="{width:.1f}" height="{thick - 2}" fill="{COLORS[index]}"/>')
            parts.append(f'<text x="{width + 8:.1f}" y="{y + 8.5}">{_number(value)}</text>')
    if limit is not None:
        x, bottom = 4 + right * limit / largest, height - 26
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{bottom}" stroke="#b00" stroke-dasharray="5 3"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{bottom + 10}" text-anchor="end" fill="#b00">budget</text>')
    parts.append(f'<text x="4" y="{height - 4}">{escape(unit)}</text>')
    return _svg("".join(parts), unit, height) + _legend(list(names))


class _Scale:
    """The mapping from values to pixels."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_low, self.x_span = x_low, (x_high - x_low) or 1.0
        self.y_low, self.y_span = y_low, (y_high - y_low) or abs(y_high) or 1.0

    def x(self, value: float) -> float:
        """Return pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / self.x_span

    def y(self, value: float) -> float:
        """Return pixels from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / self.y_span


def _axes(scale: _Scale, x_label: str, y_label: str) -> str:
    parts = []
    for step in range(5):
        value = scale.y_low + scale.y_span * step / 4
        y = scale.y(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    ticks = sorted({round(scale.x_low + scale.x_span * step / 3) for step in range(4)})
    for value in ticks:
        anchor = "end" if value == ticks[-1] and len(ticks) > 1 else "middle"
        parts.append(f'<text x="{scale.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{value}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLORS) % len(DASHES)]
    return f'stroke="{COLORS[index % len(COLORS)]}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend(names: Sequence[str]) -> str:
    items = [
        '<li><svg width="22" height="10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="22" y2="5" {_stroke(index)}/></svg> {escape(name)}</li>'
        for index, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(body: str, label: str, height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'font-size="11" fill="#222">{body}</svg>'
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
