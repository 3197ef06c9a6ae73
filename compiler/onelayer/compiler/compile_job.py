"""One compile in progress: settings, the units as they stream by, and the figures when all have.

In: resident units and the batches that run through them. Out: factors, written by the `EmulatorWriter` unit by unit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from onelayer.compiler.calibration import TokenBatch
from onelayer.compiler.compression import saved_parameters, stacked_parameters, stored_parameters, unit_linears
from onelayer.compiler.emulator import EmulatorWriter, LinearSummary
from onelayer.compiler.errors import InputError
from onelayer.compiler.factorize import Factors, Solver, factorize
from onelayer.compiler.measure import Report, Result
from onelayer.compiler.moments import NON_FINITE_LIMIT, MomentHooks, weight_shape
from onelayer.compiler.ranks import Spectrum, ranks_by_spectrum
from onelayer.compiler.stream import Stream
from onelayer.compiler.units import StreamedModel, Unit
from onelayer.compiler.workdir import StopRequest

Allocation = Literal["uniform", "spectrum"]
# With ranks by spectrum, factors are first written this many times longer than uniform ones, then cut.
SPECTRUM_HEADROOM = 2.5


@dataclass(frozen=True)
class Settings:
    """What a person chose, checked; everything here can change the emulator's bytes."""

    ratio: float
    samples: int
    max_length: int
    batch_size: int
    rank_allocation: Allocation
    solver: Solver
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"--ratio {self.ratio}: must lie between 0 and 1, for example 0.25")
        if min(self.samples, self.max_length, self.batch_size) < 1:
            raise InputError("--samples, --max-length and --batch-size must be at least 1")
        for option, value, known in (
            ("--solver", self.solver, get_args(Solver)),
            ("--rank-allocation", self.rank_allocation, get_args(Allocation)),
        ):
            if value not in known:
                raise InputError(f"{option} {value}: is none of {', '.join(known)}")

    @property
    def widest_ratio(self) -> float:
        """The keep-ratio at which factors are computed."""
        return self.ratio if self.rank_allocation == "uniform" else min(0.999, SPECTRUM_HEADROOM * self.ratio)


class CompileResult(Result):
    """What compile made. Parameters are counted over the whole model, layer parameters over its repeated layers.

    `layer_parameters_stacked` are those in stacks of matrices, the experts of a mixture, which stay dense.
    """

    output: str
    parameters_before: int
    parameters_after: int
    layer_parameters_before: int
    layer_parameters_after: int
    layer_parameters_stacked: int
    linears: list[LinearSummary]
    report: Report


class Compilation:
    """The state of one pass: which linears get which rank, what was written, what stayed dense and why."""

    def __init__(
        self,
        streamed: StreamedModel,
        ranks: dict[str, int],
        writer: EmulatorWriter,
        device: torch.device,
        settings: Settings,
        stop: StopRequest,
    ) -> None:
        self.streamed = streamed
        self.ranks = ranks
        self.writer = writer
        self.device = device
        self.settings = settings
        self.stop = stop
        # Units that some batch reached after they were written; those visits are not in their moments.
        self.revisited: set[str] = set()
        self._watched: set[str] = set()

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the moments' products: float64 where it is affordable and the solver makes use of it."""
        exact_on_host = self.settings.solver == "exact" and self.device.type == "cpu"
        return torch.float64 if exact_on_host else torch.float32

    def stream(self, batches: Sequence[TokenBatch], stream: Stream) -> None:
        """Run the pass up to the last unit that is still to be done."""
        wanted = [unit.position for unit in self.streamed.units if unit.is_block and not self.writer.has(unit)]
        if wanted:
            stream.last = max(wanted)
            stream.run([batch.inputs for batch in batches], lambda index, output: None)

    @contextmanager
    def around(self, unit: Unit) -> Iterator[Any]:
        """Watch a unit while it runs; when all batches are through, factorise its linears and write its shard."""
        linears = {name: module for name, module in unit_linears(unit) if name in self.ranks}
        if not linears or self.writer.has(unit):
            self.revisited |= {unit.name} & self._watched
            yield None
            return
        self._watched.add(unit.name)
        hooks = MomentHooks(linears, self.device, self.product_dtype)
        forward = type(unit.module).forward

        def run(index: int, args: Any, kwargs: Any) -> Any:
            hooks.next_batch()
            return forward(unit.module, *args, **kwargs)

        with hooks.attached():
            yield run
        factors = dict(self._factors(linears, hooks))
        unused = "never called; its weight may be used in another way"
        self.writer.write_unit(unit, factors, {name: unused for name in linears if name not in factors})
        self.stop.check()

    def _factors(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> Iterator[tuple[str, Factors]]:
        for name, linear in linears.items():
            moments = hooks.moments.get(name)
            if moments is None:
                continue
            gram = moments.gram
            if gram.dropped_rows > NON_FINITE_LIMIT * gram.rows:
                raise RuntimeError(
                    f"{name}: {gram.dropped_rows} of {gram.rows} calibration rows are not finite, more than "
                    f"{NON_FINITE_LIMIT:.0%}; check the checkpoint's dtype and the data"
                )
            weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
            assert isinstance(weight, torch.Tensor)
            solver, seed = self.settings.solver, self.settings.seed
            yield name, factorize(weight, moments, self.ranks[name], self.streamed.dtype, solver, seed)

    def spectrum_ranks(self) -> dict[str, int]:
        """Ranks that spend the budget of the asked ratio by the singular values found."""
        spectra = {}
        for unit in self.streamed.units:
            for name, module in unit_linears(unit):
                if (found := self.writer.linears.get(name)) is not None:
                    out_features, in_features = weight_shape(module)
                    spectra[name] = Spectrum(out_features, in_features, found.singular_values, found.output_energy)
        return ranks_by_spectrum(spectra, self.settings.ratio)

    def remarks(self) -> dict[str, Any]:
        """What a reader of `emulator.json` should know: linears that stayed dense and why, units seen only in part."""
        told = {name: reason for record in self.writer.records for name, reason in record.dense.items()}
        missing = (name for name in self.ranks if name not in self.writer.linears and name not in told)
        dense = {**told, **dict.fromkeys(missing, "never visited by the calibration data")}
        return {
            "dense": [{"name": name, "reason": reason} for name, reason in dense.items()],
            "revisited": sorted(self.revisited),
        }

    def result(self, output: Path, report: Report) -> CompileResult:
        """The figures of the finished pass."""
        saved = saved_parameters(self.streamed, {name: found.rank for name, found in self.writer.linears.items()})
        before, layers = stored_parameters(self.streamed), stored_parameters(self.streamed, blocks_only=True)
        return CompileResult(
            output=str(output),
            parameters_before=before,
            parameters_after=before - saved,
            layer_parameters_before=layers,
            layer_parameters_after=layers - saved,
            layer_parameters_stacked=stacked_parameters(self.streamed),
            linears=[found.summary for found in self.writer.linears.values()],
            report=report,
        )
