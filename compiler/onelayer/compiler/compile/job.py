"""One compile in progress: settings, the units as they stream by, and the figures when all have.

In: resident units and the batches that run through them. Out: factors, written by the `EmulatorWriter` unit by unit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.compile.expert_factors import ExpertCalls, compress_stacks, hooks_on
from onelayer.compiler.compile.linear_moments import MomentHooks
from onelayer.compiler.compile.selection import Ranks, saved_parameters, stacked_parameters, stored_parameters
from onelayer.compiler.compile.settings import CompileSettings
from onelayer.compiler.compile.writer import EmulatorWriter, StoredLinear, StoredStack
from onelayer.compiler.data.batches import TokenBatch
from onelayer.compiler.emulators.figures import LinearFigures, LinearSummary, StackSummary, kept_bytes_share
from onelayer.compiler.emulators.reader import DENSE, DOWN, UP
from onelayer.compiler.factors.factorize import factorize
from onelayer.compiler.factors.moments import Moments, check_rows
from onelayer.compiler.factors.quantized_factors import output_energy, quantize_dense, quantize_factors
from onelayer.compiler.factors.ranks import Allocation, Spectrum, allocate_by_spectrum
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.meter import Meter, return_free_memory
from onelayer.compiler.models.experts import stacks_below
from onelayer.compiler.models.linears import unit_linears, weight_shape
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.results import Report, Result
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream


class CompileResult(Result):
    """What compile made. Parameters are counted over the whole model, layer parameters over its repeated layers.

    `layer_parameters_stacked` are those in stacks of matrices that stay dense: experts that do not answer to
    transformers' interface. `stacks` are those that do, as factors. `kept_bytes_share`: the bytes of all that is
    compressed, as a share of what it took at 16 bits. `ratio`, `factor_dtype` (None: the original's) and
    `rank_allocation` are those that were used, given or chosen.
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


class Compilation:
    """The state of one pass: what gets which rank, what was written, what stayed dense and why.

    `ranks` of linears, `stack_ranks` of stacks of experts; these are uniform whatever the allocation.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        ranks: Ranks,
        stack_ranks: Ranks,
        writer: EmulatorWriter,
        device: torch.device,
        settings: CompileSettings,
        stop: StopRequest,
        spill_pool: SpillPool,
    ) -> None:
        self.streamed = streamed
        self.ranks, self.stack_ranks = ranks, stack_ranks
        self.spill_pool = spill_pool
        self.writer = writer
        self.device = device
        self.settings = settings
        self.stop = stop
        # Units that some batch reached after they were written; those visits are not in their moments.
        self.revisited: set[str] = set()
        self._watched: set[str] = set()
        self._meter: Meter | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the moments' products: float64 where it is affordable and the solver makes use of it."""
        exact_on_host = self.settings.solver == "exact" and self.device.type == "cpu"
        return torch.float64 if exact_on_host else torch.float32

    def stream(self, batches: Sequence[TokenBatch], meter: Meter) -> None:
        """Run the pass up to the last unit that is still to be done."""
        stream = Stream(
            self.streamed, self.device, meter, on_unit=self.on_unit, spill_pool=self.spill_pool, description="compile"
        )
        wanted = [unit.position for unit in self.streamed.units if unit.is_block and not self.writer.has(unit)]
        if wanted:
            stream.stop_after, self._meter = max(wanted), stream.meter
            stream.run([batch.inputs for batch in batches], lambda index, output: None)

    @contextmanager
    def on_unit(self, unit: Unit) -> Iterator[Any]:
        """Watch a unit while it runs; when all batches are through, factorize what it holds and write its shard."""
        linears = {name: module for name, module in unit_linears(unit) if name in self.ranks}
        experts = [
            ExpertCalls(found, self.spill_pool, self.device, self.product_dtype)
            for found in stacks_below(unit.name, unit.module)
            if self.stack_ranks.keys() & set(found.paths)
        ]
        if not (linears or experts) or self.writer.has(unit):
            self.revisited |= {unit.name} & self._watched
            yield None
            return
        self._watched.add(unit.name)
        hooks = MomentHooks(linears, self.device, self.product_dtype)

        def run(index: int, args: Any, kwargs: Any) -> Any:
            hooks.next_batch()
            return unit.forward(*args, **kwargs)

        with hooks.attached(), hooks_on(experts):
            yield run
        stored = dict(self._factors(linears, hooks))
        stacks = {name: item for calls in experts if calls.reason is None for name, item in self._stacks(calls)}
        dense = {name: hooks.reason(name) for name in linears if name not in stored}
        for calls in experts:
            if calls.reason is not None:
                dense |= dict.fromkeys((name for name in calls.stacks.paths if name in self.stack_ranks), calls.reason)
        self.writer.write_unit(unit, stored, stacks, dense)
        if self._meter is not None and (stored or stacks):
            figures = [*(item.figures for item in stored.values()), *(item.figures for item in stacks.values())]
            self._meter.note = f"error at most {max(item.error for item in figures):.3f}"
        self.stop.check()

    def _factors(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> Iterator[tuple[str, StoredLinear]]:
        for name, linear in linears.items():
            moments = hooks.moments.get(name)
            if moments is None:
                continue
            check_rows(name, moments.gram.dropped_rows, moments.gram.rows)
            weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
            assert isinstance(weight, torch.Tensor)
            both = self.settings.rank_allocation == "spectrum"
            yield name, self._compress(name, weight, moments, self.ranks[name], None, both)
            return_free_memory()  # the solver's, lest the next one's come on top where its holes do not fit

    def _stacks(self, calls: ExpertCalls) -> Iterator[tuple[str, StoredStack]]:
        return compress_stacks(calls, self.stack_ranks, self._compress)

    def _compress(
        self,
        name: str,
        weight: torch.Tensor,
        moments: Moments,
        rank: int | None,
        reserve: Callable[[], Moments] | None,
        both: bool = False,
    ) -> StoredLinear:
        """A weight (out, in) as it will be stored; with `both` and quantized as factors and whole, to choose later."""
        settings, kind, dtype = self.settings, self.settings.factor_dtype, self.streamed.dtype
        if kind is None:
            assert rank is not None, "a linear that would stay as it is, is not compressed"
            factors = factorize(weight, moments, rank, dtype, settings.solver, settings.seed, reserve)
            figures = LinearFigures.of(name, factors, None, None)
            return StoredLinear(figures, {UP: factors.up, DOWN: factors.down})
        if rank is None:
            energy = output_energy(weight, moments)
            dense = quantize_dense(weight, moments, energy, kind, dtype)
            return StoredLinear(LinearFigures.of_dense(name, weight.shape, energy, dense.error), {DENSE: dense.weight})
        factors = factorize(weight, moments, rank, torch.float32, settings.solver, settings.seed, reserve)
        packed = quantize_factors(weight, moments, factors, kind, dtype)
        tensors = {UP: packed.up, DOWN: packed.down}
        if not both:
            return StoredLinear(LinearFigures.of(name, factors, packed, None), tensors)
        dense = quantize_dense(weight, moments, factors.energy, kind, dtype)
        return StoredLinear(LinearFigures.of(name, factors, packed, dense), {**tensors, DENSE: dense.weight})

    def spectrum_ranks(self) -> dict[str, int | None]:
        """Ranks that spend the budget of the asked ratio by the singular values found."""
        spectra, linears = {}, self.writer.linears
        for unit in self.streamed.units:
            for name, module in unit_linears(unit):
                found = linears.get(name)
                if found is not None and found.form == "factors":
                    values, energy = found.singular_values, found.output_energy
                    errors, kind = (found.prefix_errors, found.dense_error), self.settings.factor_dtype
                    spectra[name] = Spectrum(*weight_shape(module), values, energy, *errors, kind)
        return allocate_by_spectrum(spectra, self.settings.ratio)

    def remarks(self) -> dict[str, Any]:
        """What a reader of `emulator.json` should know: what stayed dense and why, units seen only in part."""
        told = {name: reason for record in self.writer.records for name, reason in record.dense.items()}
        written = self.writer.linears.keys() | self.writer.stacks.keys()
        missing = (name for name in (*self.ranks, *self.stack_ranks) if name not in written and name not in told)
        dense = {**told, **dict.fromkeys(missing, "never visited by the calibration data")}
        return {
            "dense": [{"name": name, "reason": reason} for name, reason in dense.items()],
            "revisited": sorted(self.revisited),
        }

    def result(self, output: Path, report: Report) -> CompileResult:
        """The figures of the finished pass."""
        linears = self.writer.linears
        factored = {name: found.rank for name, found in linears.items() if found.form == "factors"}
        stacks = self.writer.stacks
        shorter = {name: found.rank for name, found in stacks.items() if found.form == "factors"}
        saved = saved_parameters(self.streamed, factored, shorter)
        weights = {name: weight_shape(self.streamed.model.get_submodule(name)) for name in linears}
        sizes = {name: size for record in self.writer.records for name, size in record.tensor_bytes.items()}
        before, layers = stored_parameters(self.streamed), stored_parameters(self.streamed, blocks_only=True)
        return CompileResult(
            output=str(output),
            ratio=self.settings.ratio,
            factor_dtype=self.settings.factor_dtype,
            rank_allocation=self.settings.rank_allocation,
            parameters_before=before,
            parameters_after=before - saved,
            layer_parameters_before=layers,
            layer_parameters_after=layers - saved,
            layer_parameters_stacked=stacked_parameters(self.streamed, but=stacks),
            kept_bytes_share=kept_bytes_share(sizes, weights, {name: found.shape for name, found in stacks.items()}),
            linears=[found.summary for found in linears.values()],
            stacks=[found.stack_summary for found in stacks.values()],
            report=report,
        )
