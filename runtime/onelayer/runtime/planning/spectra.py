"""The figures of each choice, and by an emulator's spectra what it leaves out of the original's outputs."""

from pathlib import Path

from pydantic import BaseModel

from onelayer.compiler.documents import checked_document
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.results import Result
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.planning.choice import Choice, median_rank
from onelayer.runtime.planning.shapes import ModelShapes


class FactorChoice(Result):
    """One way to store linears: the largest ratio that fits, the median linear's rank there, bytes, expected error.

    `form` is `coded` or `factors`. Codes have a ratio too, that of factors in `factor_dtype` of equal bytes, and
    `keep_bytes`, their share of the bytes at 16 bits; their rank is that of what they leave out.

    `error` is the root mean square over linears of what truncation at that rank loses, if spectra are known; rounding
    error comes on top. With `error_is_bound` the spectra are shorter than the rank and `error` is an upper bound.
    """

    form: str
    factor_dtype: FactorDtype
    ratio: float | None
    keep_bytes: float | None
    rank: int | None
    emulator_bytes: int
    train_bytes: int
    error: float | None = None
    error_is_bound: bool = False


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
            ends = f"{block.name}.{linear.name}".strip(".").split(".")[1:]
            row = next((row for name, row in spectra.items() if name.split(".")[-len(ends) :] == ends), None)
            rank = rank_for(ratio, linear.out_features, linear.in_features)
            if row is None or rank is None or not row.output_energy:
                squares.append(0.0)
                continue
            values = row.singular_values[:rank]
            is_bound |= len(values) < rank
            squares.append(max(0.0, 1 - sum(value * value for value in values) / row.output_energy))
    return round((sum(squares) / len(squares)) ** 0.5, 4), is_bound


def factor_choice(shapes: ModelShapes, choice: Choice, spectra: Spectra | None) -> FactorChoice:
    """Return the figures of a choice, with its expected error if spectra are known."""
    row = FactorChoice(
        form=choice.form,
        factor_dtype=choice.factor_dtype,
        ratio=choice.ratio,
        keep_bytes=choice.keep_bytes,
        rank=None if choice.ratio is None else median_rank(shapes, choice),
        emulator_bytes=choice.memory.emulator,
        train_bytes=choice.memory.peak,
    )
    if spectra is None or choice.ratio is None or choice.stored == "coded":
        return row
    error, is_bound = left_out(shapes, choice.ratio, spectra)
    return row.model_copy(update={"error": error, "error_is_bound": is_bound})
