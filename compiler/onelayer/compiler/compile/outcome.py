"""The outcome of a finished compile: ranks by spectrum, remarks and the figures of the result.

In: what the `EmulatorWriter` recorded, unit by unit. Out: plain values; no weights are read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onelayer.compiler.compile.selection import saved_parameters, stacked_parameters, stored_parameters
from onelayer.compiler.compile.settings import ResolvedSettings
from onelayer.compiler.compile.writer import EmulatorWriter
from onelayer.compiler.emulators.figures import LinearSummary, StackSummary, kept_bytes_share
from onelayer.compiler.factors.ranks import Allocation, Spectrum, allocate_by_spectrum
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.console import notice
from onelayer.compiler.models.linears import unit_linears, weight_shape
from onelayer.compiler.results import Report, Result

NEVER_VISITED = "never visited by the calibration data"


class CompileResult(Result):
    """The result of a compile. Parameters are counted over the whole model, layer parameters over its repeated layers.

    `layer_parameters_stacked` are those in stacks of matrices that stay dense: experts that do not implement
    transformers' interface. `stacks` are the stacks that became factors. `kept_bytes_share` is the size of everything
    compressed as a share of its 16-bit size. `ratio`, `factor_dtype` (None: the original's) and `rank_allocation` are
    the values that were used, given or chosen.
    """

    output: str
    ratio: float
    factor_dtype: FactorDtype | None
    rank_allocation: Allocation
    parameters_before: int
    parameters_after: int
    layer_parameters_before: int
    layer_parameters_after: int
    layer_parameters_stacked: int
    kept_bytes_share: float
    linears: list[LinearSummary]
    stacks: list[StackSummary]
    report: Report


def spectrum_ranks(writer: EmulatorWriter, settings: ResolvedSettings) -> dict[str, int | None]:
    """Spend the budget of the requested ratio by the singular values of the written factors."""
    spectra, linears = {}, writer.linears
    for unit in writer.streamed.units:
        for name, module in unit_linears(unit):
            figures = linears.get(name)
            if figures is not None and figures.form == "factors":
                values, energy = figures.singular_values, figures.output_energy
                errors, factor_dtype = (figures.prefix_errors, figures.dense_error), settings.factor_dtype
                spectra[name] = Spectrum(*weight_shape(module), values, energy, *errors, factor_dtype)
    return allocate_by_spectrum(spectra, settings.ratio)


def tell_unvisited(dense: Sequence[Mapping[str, str]]) -> None:
    """Print a notice if the calibration data never reached some linears, such as those that read images."""
    names = [item["name"] for item in dense if item["reason"] == NEVER_VISITED]
    if names:
        notice(
            f"{len(names)} of the linears to compress stay dense ({names[0]}, ...): the calibration data never visited "
            "them; give rows with images or audio for layers that read these"
        )


def remarks(writer: EmulatorWriter, wanted: Iterable[str], revisited: Iterable[str]) -> dict[str, Any]:
    """List what a reader of `emulator.json` should know: what stayed dense and why, and units seen only in part.

    `wanted` names all linears and stacks that were to be compressed.
    """
    reasons = {name: reason for record in writer.records for name, reason in record.dense.items()}
    written = writer.linears.keys() | writer.stacks.keys()
    missing = (name for name in wanted if name not in written and name not in reasons)
    dense = {**reasons, **dict.fromkeys(missing, NEVER_VISITED)}
    return {
        "dense": [{"name": name, "reason": reason} for name, reason in dense.items()],
        "revisited": sorted(revisited),
    }


def compile_result(writer: EmulatorWriter, settings: ResolvedSettings, output: Path, report: Report) -> CompileResult:
    """Collect the figures of a finished pass."""
    streamed, linears, stacks = writer.streamed, writer.linears, writer.stacks
    factored = {name: figures.rank for name, figures in linears.items() if figures.form == "factors"}
    factored_stacks = {name: figures.rank for name, figures in stacks.items() if figures.form == "factors"}
    saved = saved_parameters(streamed, factored, factored_stacks)
    weights = {name: weight_shape(streamed.model.get_submodule(name)) for name in linears}
    sizes = {name: size for record in writer.records for name, size in record.tensor_bytes.items()}
    before, layers = stored_parameters(streamed), stored_parameters(streamed, blocks_only=True)
    return CompileResult(
        output=str(output),
        ratio=settings.ratio,
        factor_dtype=settings.factor_dtype,
        rank_allocation=settings.rank_allocation,
        parameters_before=before,
        parameters_after=before - saved,
        layer_parameters_before=layers,
        layer_parameters_after=layers - saved,
        layer_parameters_stacked=stacked_parameters(streamed, but=stacks),
        kept_bytes_share=kept_bytes_share(sizes, weights, {name: figures.shape for name, figures in stacks.items()}),
        linears=[figures.summary for figures in linears.values()],
        stacks=[figures.stack_summary for figures in stacks.values()],
        report=report,
    )
