"""An emulator in, a picture out: how far each linear is from the original by depth, and how fast its spectrum falls."""

import re
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.files import read_json

_NUMBER = re.compile(r"\.(\d+)\.")


def plot_emulator(emulator: str | Path, file: str | Path) -> None:
    """Draw ranks, errors and spectra of `emulator.json` into `file`; its suffix (.png, .svg, .pdf) says the format.

    Raises `InputError` where matplotlib is missing (`pip install 'onelayer[plot]'`) or `emulator` is none.
    """
    path = Path(emulator) / "emulator.json"
    document = read_json(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot: needs matplotlib; pip install 'onelayer[plot]'") from None
    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in [*document["linears"], *document.get("stacks", [])]:
        numbers = _NUMBER.findall(row["name"])
        kind = _NUMBER.split(row["name"])[-1]
        kinds.setdefault(kind, []).append((int(numbers[0]) if numbers else 0, row))
    figure = Figure(figsize=(13, 5), layout="constrained")
    errors, spectra = figure.subplots(1, 2)
    for kind, rows in kinds.items():
        depths = [depth for depth, _ in rows]
        (line,) = errors.plot(depths, [row["error"] for _, row in rows], marker="o", markersize=4, label=kind)
        _spectrum(spectra, rows, line.get_color(), kind)
    settings = document["settings"]
    errors.set(xlabel="layer", ylabel="relative error of the output", title="Error by depth", ylim=(0, None))
    errors.xaxis.get_major_locator().set_params(integer=True)
    errors.legend(fontsize="small", ncols=2)
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


def _spectrum(axes: Any, rows: list[tuple[int, dict[str, Any]]], color: str, label: str) -> None:
    """The share of the output's energy that is left after k directions, for the layer of median error."""
    _, row = sorted(rows, key=lambda item: float(item[1]["error"]))[len(rows) // 2]
    if not row["output_energy"]:
        return
    left, remaining = [], 1.0
    for value in row["singular_values"]:
        remaining -= value * value / row["output_energy"]
        left.append(max(remaining, 1e-9))
    axes.plot(range(1, len(left) + 1), left, color=color, label=label)
