"""One compile in progress: units are watched as they stream by, and their factors are written.

In: resident units and the batches that run through them. Out: factors, written by the `EmulatorWriter` unit by unit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from onelayer.compiler.compile.expert_factors import ExpertCalls, compress_stacks, hooks_on
from onelayer.compiler.compile.linear_moments import MomentHooks
from onelayer.compiler.compile.resume import UnitRecord
from onelayer.compiler.compile.selection import Choice
from onelayer.compiler.compile.settings import ResolvedSettings
from onelayer.compiler.compile.shared_moments import add_up_moments, settle_grids
from onelayer.compiler.compile.solving import Solved, in_turn, solve_all
from onelayer.compiler.compile.writer import EmulatorWriter, StoredLinear, StoredStack
from onelayer.compiler.emulators.facts import DENSE, DOWN, UP
from onelayer.compiler.emulators.figures import LinearFigures
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.factorize import Method, factorize
from onelayer.compiler.factors.moments import Moments, OutputWeights, check_rows, dropped_rows
from onelayer.compiler.factors.quantized_factors import output_energy, quantize_dense, quantize_factors
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.experts import stacks_below
from onelayer.compiler.models.linears import unit_linears, weight_of
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.calibration_stream import CalibrationStream
from onelayer.compiler.streaming.denoising_loss import PassBatch
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream
from onelayer.compiler.streaming.unit_loads import UnitLoads


class Compilation:
    """The state of one pass: which weight gets which rank, and which units were written or visited too late.

    `ranks` are those of linears, `stack_ranks` those of stacks of experts, which are uniform in every allocation and
    coded if there is a `stack_width`.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        chosen: Choice,
        writer: EmulatorWriter,
        device: torch.device,
        settings: ResolvedSettings,
        stop: StopRequest,
        spill_pool: SpillPool,
    ) -> None:
        self.team = processes()
        self.streamed = streamed
        self.chosen = chosen
        self.ranks, self.stack_ranks = chosen.linears, chosen.stacks
        self.spill_pool = spill_pool
        self.writer = writer
        self.device = device
        self.settings = settings
        self.stop = stop
        # Units that some batch reached after they were written; those visits are not in their moments.
        self.revisited: set[str] = set()
        self.loads = UnitLoads()
        # The features of the inputs whose moments were gathered in blocks, by the position of their unit.
        self.inputs: dict[int, list[int]] = {}
        self._watched: set[str] = set()
        self._meter: Meter | None = None
        self._batches = 1  # of all processes

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the moments' products: float64 where it is affordable and the solver makes use of it."""
        exact_on_host = self.settings.solver == "exact" and self.device.type == "cpu"
        return torch.float64 if exact_on_host else torch.float32

    def stream(self, batches: Sequence[PassBatch], meter: Meter) -> None:
        """Run the pass up to the last unit that is not written yet; with `backward`, also back to the first."""
        wanted = [unit.position for unit in self.streamed.units if unit.is_block and not self.writer.has(unit)]
        if not wanted:
            return
        self._meter, self._batches = meter, len(batches)
        if self.settings.backward:
            self._stream_both_ways(batches, meter, min(wanted))
            return
        stream = Stream(
            self.streamed,
            self.device,
            meter,
            on_unit=self.on_unit,
            spill_pool=self.spill_pool,
            description="compile",
            team=self.team,
            loads=self.loads,
        )
        stream.stop_after = max(wanted)
        stream.run([batches[index].inputs for index in self.team.share(len(batches))], lambda index, output: None)
        self.revisited = set().union(*self.team.gather(self.revisited))

    def _stream_both_ways(self, batches: Sequence[PassBatch], meter: Meter, first_wanted: int) -> None:
        """Run forward, which keeps the inputs of all units, and back, where units are watched and written."""
        stream = CalibrationStream(
            self.streamed,
            self.device,
            meter,
            on_unit=self._stopping,
            spill_pool=self.spill_pool,
            loads=self.loads,
            description="compile",
            team=self.team,
            seed=self.settings.seed,
            dropout=False,
            first_wanted=first_wanted,
        )
        stream.both_ways(batches, self.on_unit)
        self.revisited = set().union(*self.team.gather(self.revisited))

    @contextmanager
    def _stopping(self, unit: Unit) -> Iterator[None]:
        """Stop after a unit if that was asked for: nothing is written on the way forward."""
        yield
        self.stop.check()

    @contextmanager
    def on_unit(self, unit: Unit) -> Iterator[Any]:
        """Watch a unit while it runs; when all batches are through, factorize its weights and write its shard."""
        linears = {name: module for name, module in unit_linears(unit) if name in self.ranks}
        experts = [
            ExpertCalls(stacks, self.spill_pool, self.device, self.product_dtype)
            for stacks in stacks_below(unit.name, unit.module)
            if self.stack_ranks.keys() & set(stacks.paths)
        ]
        if not (linears or experts) or self.writer.has(unit):
            self.revisited |= {unit.name} & self._watched
            yield None
            return
        self._watched.add(unit.name)
        hooks, settled = self.hooks(linears), self.team.is_alone

        def run(index: int, args: Any, kwargs: Any) -> Any:
            nonlocal settled
            hooks.next_batch()
            output = unit.forward(*args, **kwargs)
            if not settled:
                settle_grids(hooks, self.team)
                settled = True
            return output

        with hooks.attached(), hooks_on(experts):
            yield run
        if not settled:  # this process has no batch
            settle_grids(hooks, self.team)
        self._write(unit, linears, hooks, experts)
        self.stop.check()

    def hooks(self, linears: dict[str, torch.nn.Module]) -> MomentHooks:
        """Return the hooks that gather what the factors of a unit need."""
        waits = not self.team.is_first
        return MomentHooks(linears, self.device, self.product_dtype, batches=self._batches, waits=waits)

    def _write(
        self, unit: Unit, linears: dict[str, torch.nn.Module], hooks: MomentHooks, experts: Sequence[ExpertCalls]
    ) -> None:
        """Compress the weights of a resident unit, write its shard and show its largest error."""
        if hooks.sides:
            read = {id(gram): gram.features for gram in hooks.inputs.values()}
            self.inputs[unit.position] = list(read.values())
        add_up_moments(hooks, self.team)
        for calls in experts:
            calls.gather(self.team)
        mine = self.compressed(linears, hooks)
        stored = {name: item for part in self.team.gather_in_first(mine) for name, item in part.items()}
        record = self.team.by_first(lambda: self._write_unit(unit, linears, hooks, experts, stored))
        self.writer.work.finished[unit.position] = record

    def _write_unit(
        self,
        unit: Unit,
        linears: dict[str, torch.nn.Module],
        hooks: MomentHooks,
        experts: Sequence[ExpertCalls],
        stored: dict[str, StoredLinear],
    ) -> UnitRecord:
        """Write the shard of a unit whose linears are compressed."""
        stored = {name: stored[name] for name in linears if name in stored}
        stacks = {name: item for calls in experts if calls.reason is None for name, item in self._stacks(calls)}
        dense = {name: hooks.reason(name) for name in linears if name not in stored}
        for calls in experts:
            if calls.reason is not None:
                dense |= dict.fromkeys((name for name in calls.stacks.paths if name in self.stack_ranks), calls.reason)
        self.writer.write_unit(unit, stored, stacks, dense)
        if self._meter is not None and (stored or stacks):
            figures = [*(item.figures for item in stored.values()), *(item.figures for item in stacks.values())]
            self._meter.note = f"error at most {max(item.error for item in figures):.3f}"
        return self.writer.work.finished[unit.position]

    def compressed(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> dict[str, StoredLinear]:
        """Return what replaces the weight of each linear that has moments, on the host."""
        gathered = {name: hooks.moments[name] for name in linears if name in hooks.moments}
        dropped = dropped_rows([moments.gram.dropped for moments in gathered.values()])
        for (name, moments), count in zip(gathered.items(), dropped, strict=True):
            check_rows(name, count, moments.gram.rows)

        def solve(name: str, expected: Expectations) -> Solved:
            outputs = hooks.output_weights(name, expected)
            with_dense = self.settings.rank_allocation == "spectrum"
            weight, moments, rank = weight_of(linears[name]), gathered[name], self.ranks[name]
            return self._compress(name, weight, moments, rank, expected, None, with_dense, outputs)

        return solve_all(in_turn(gathered), solve, self.device)

    def _stacks(self, calls: ExpertCalls) -> Iterator[tuple[str, StoredStack]]:
        return compress_stacks(calls, self.stack_ranks, self._compress)

    def _compress(
        self,
        name: str,
        weight: torch.Tensor,
        moments: Moments,
        rank: int | None,
        expected: Expectations,
        fallback_moments: Callable[[], Moments] | None,
        with_dense: bool = False,
        outputs: OutputWeights | None = None,
    ) -> Solved:
        """Compress a weight (out, in) to the form in which it is stored.

        With `with_dense`, quantized factors come with the quantized weight, so that a later step can choose. `outputs`:
        what its outputs count; without, all alike.
        """
        settings, factor_dtype, dtype = self.settings, self.settings.factor_dtype, self.streamed.dtype
        if factor_dtype is not None and rank is None:
            energy = output_energy(weight, moments, outputs)
            dense = quantize_dense(weight, moments, energy, factor_dtype, dtype, outputs)
            figures = partial(LinearFigures.of_dense, name, weight.shape)
            return Solved({DENSE: dense.weight}, (energy, dense.error), figures)
        assert rank is not None, "a linear without a rank stays dense and is not compressed"
        used = dtype if factor_dtype is None else torch.float32
        method = Method(settings.solver, settings.seed, expected)
        factors = factorize(weight, moments, rank, used, method, fallback_moments, outputs)
        figures, known = partial(LinearFigures.of, name, rank), factors.figures
        if factor_dtype is None:
            return Solved({UP: factors.up, DOWN: factors.down}, (known, None, None), figures)
        quantized = quantize_factors(weight, moments, factors, factor_dtype, dtype, outputs, expected)
        tensors = {UP: quantized.up, DOWN: quantized.down}
        if not with_dense:
            return Solved(tensors, (known, quantized.errors, None), figures)
        dense = quantize_dense(weight, moments, known.energy, factor_dtype, dtype, outputs)
        return Solved({**tensors, DENSE: dense.weight}, (known, quantized.errors, dense.error), figures)
