"""An emulator in, a picture out: distances of its linears, or refined layers, from the original, and spectra."""

import re
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json

# Records of linears, stacks or layers, each with its depth.
Rows = list[tuple[int, dict[str, Any]]]

_NUMBER = re.compile(r"\.(\d+)\.")


def plot_emulator(emulator: str | Path, file: str | Path) -> None:
    """Draw ranks, errors and spectra of `emulator.json` into `file`; its suffix (.png, .svg, .pdf) is the format.

    Raises `InputError` if matplotlib is missing (`pip install 'onelayer[plot]'`) or `emulator` is not an emulator.
    """
    path = Path(emulator) / "emulator.json"
    document = read_json(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot: needs matplotlib; pip install 'onelayer[plot]'") from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    errors, spectra = figure.subplots(1, 2)
    layers: dict[str, Rows] = {}
    for unit in document.get("refined", {}).get("units", []):
        layers.setdefault(_NUMBER.split(f"{unit['name']}.")[0], []).append((_depth(unit["name"]), unit))
    for number, (group, rows) in enumerate(layers.items()):
        for field, style, when in (("before", ":", "as compiled"), ("after", "-", "refined")):
            _errors(errors, rows, field, color=str(number / len(layers)), linestyle=style, label=f"{group}, {when}")
    linears: dict[str, Rows] = {}
    for row in [*document["linears"], *document.get("stacks", [])]:
        linears.setdefault(_NUMBER.split(row["name"])[-1], []).append((_depth(row["name"]), row))
    for number, (leaf, rows) in enumerate(linears.items()):
        # A refined linear no longer has an error of its own.
        _errors(errors, [item for item in rows if "error" in item[1]], "error", color=f"C{number}", label=leaf)
        _spectrum(spectra, [row for _, row in rows], color=f"C{number}", label=leaf)
    settings = document["settings"]
    errors.set(xlabel="layer", ylabel="relative error of the output", title="Error by depth", ylim=(0, None))
    errors.xaxis.get_major_locator().set_params(integer=True)
    for axes in (errors, spectra) if layers else (errors,):
        axes.legend(fontsize="small", ncols=2)
    spectra.set(
        xlabel="directions kept",
        ylabel="energy not yet captured",
        title="What each further direction buys (median layer)",
        yscale="log",
    )
    for axes in (errors, spectra):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    share = document["layer_parameters_after"] / document["layer_parameters_before"]
    name = Path(document["base"]["model"]).name
    figure.suptitle(f"Emulator of {name}: keep-ratio {settings['ratio']}, {share:.0%} of the layers' parameters")
    figure.savefig(file, dpi=130)


def _depth(name: str) -> int:
    numbers = _NUMBER.findall(f"{name}.")
    return int(numbers[0]) if numbers else 0


def _errors(axes: Any, rows: Rows, field: str, **style: Any) -> None:
    if rows:
        axes.plot([depth for depth, _ in rows], [row[field] for _, row in rows], marker="o", markersize=4, **style)


def _spectrum(axes: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    """Plot the share of output energy that is left after k directions, for the layer with the median share."""
    curves = sorted((_left(row) for row in rows if row["output_energy"]), key=lambda left: left[-1:])
    if curves:
        left = curves[len(curves) // 2]
        axes.plot(range(1, len(left) + 1), left, **style)


def _left(row: dict[str, Any]) -> list[float]:
    left, remaining = [], 1.0
    for value in row["singular_values"]:
        remaining -= value * value / row["output_energy"]
        left.append(max(remaining, 1e-9))
    return left
