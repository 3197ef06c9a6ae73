"""The spectra of an emulator: what each choice of ranks leaves out of the original's outputs."""

from pathlib import Path

from pydantic import BaseModel

from onelayer.compiler.documents import checked_document
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.planning.shapes import ModelShapes


class Spectrum(BaseModel):
    """The leading singular values of a linear's output, and its energy, the sum of the squares of all."""

    name: str
    singular_values: list[float] = []
    output_energy: float | None = None


class _Record(BaseModel):
    """The fields of `emulator.json` that a plan needs."""

    linears: list[Spectrum]


Spectra = dict[str, Spectrum]


def read_spectra(emulator: Path) -> Spectra:
    """Read the spectrum of each linear, by name, from `emulator.json`. Raises `InputError` if there are none."""
    file = emulator / "emulator.json"
    record = checked_document(_Record, read_json(file), file, "give an emulator directory")
    return {row.name: row for row in record.linears}


def left_out(shapes: ModelShapes, ratio: float, spectra: Spectra) -> tuple[float | None, bool]:
    """Compute the root mean square over linears of what `ratio` leaves out, and whether it is only an upper bound."""
    squares, is_bound = [], False
    for block in shapes.blocks:
        for linear in block.compressible:
            # Names in headers and in modules may differ by a prefix; those of blocks and linears are equal.
            ends = f"{block.name}.{linear.name}".split(".")[1:]
            row = next((row for name, row in spectra.items() if name.split(".")[-len(ends) :] == ends), None)
            rank = rank_for(ratio, linear.out_features, linear.in_features)
            if row is None or rank is None or not row.output_energy:
                squares.append(0.0)
                continue
            values = row.singular_values[:rank]
            is_bound |= len(values) < rank
            squares.append(max(0.0, 1 - sum(value * value for value in values) / row.output_energy))
    return round((sum(squares) / len(squares)) ** 0.5, 4), is_bound
