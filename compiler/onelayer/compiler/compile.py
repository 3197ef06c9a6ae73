"""The compile pass: the original streams by once, an emulator of it is written behind it.

In: a checkpoint and a data set. Out: an emulator directory. Held on the device: one unit, the moments of its linears,
one micro-batch. Read: every tensor once, embeddings by rows.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from onelayer.compiler.calibration import DataSource, make_batches, read_tokens, tokens_digest
from onelayer.compiler.checkpoint import model_digest, resolve_model
from onelayer.compiler.emulator import EmulatorWriter
from onelayer.compiler.errors import InputError
from onelayer.compiler.factorize import Factors, factorize
from onelayer.compiler.files import atomic_directory, check_output
from onelayer.compiler.measure import Meter, Report, Result
from onelayer.compiler.moments import NON_FINITE_LIMIT, MomentHooks, is_linear, weight_shape
from onelayer.compiler.ranks import rank_for
from onelayer.compiler.stream import Stream, pick_device
from onelayer.compiler.tokens import load_tokenizer
from onelayer.compiler.units import StreamedModel, Unit

# A linear that holds less than this share of its layer's linear weights stays dense: a router or a gate saves nothing
# and decides much.
SMALL_SHARE = 0.005


class LinearSummary(Result):
    """One factorised linear; errors are relative Frobenius errors of its output over the calibration rows."""

    name: str
    rank: int
    error: float
    optimal_error: float


class CompileResult(Result):
    """What compile made. Parameters are counted over the whole model, layer parameters over its repeated layers."""

    output: str
    parameters_before: int
    parameters_after: int
    layer_parameters_before: int
    layer_parameters_after: int
    linears: list[LinearSummary]
    report: Report


def compile_emulator(
    model: str | Path,
    calibration: DataSource,
    output: str | Path,
    *,
    ratio: float = 0.25,
    samples: int = 64,
    max_length: int = 512,
    batch_size: int = 1,
    device: str | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> CompileResult:
    """Compile the emulator of a model that keeps `ratio` of the weights of each linear in its repeated layers.

    `samples` examples of at most `max_length` tokens are drawn from `calibration`. Raises `InputError` for what the
    caller can mend; nothing is left in `output` unless the whole emulator is.
    """
    if not 0 < ratio < 1:
        raise InputError(f"--ratio {ratio}: must lie between 0 and 1, for example 0.25")
    if min(samples, max_length, batch_size) < 1:
        raise InputError("--samples, --max-length and --batch-size must be at least 1")
    output = Path(output)
    check_output(output)
    place = pick_device(device)
    directory = resolve_model(model, revision)
    streamed = StreamedModel(directory)
    ranks = choose_ranks(streamed, ratio)
    tokens = read_tokens(calibration, load_tokenizer(directory), max_length, samples, seed)
    batches = make_batches(tokens, streamed.config, batch_size)
    # A relative path would be taken for a Hub id from another working directory.
    name = str(Path(model).absolute()) if Path(model).exists() else str(model)
    base = {"model": name, "revision": revision, "digest": model_digest(directory)}
    with atomic_directory(output) as work, Meter(place) as meter:
        job = _Compilation(streamed, ranks, EmulatorWriter(work, streamed), place)
        last = max(unit.position for unit in streamed.units if unit.is_block)
        stream = Stream(streamed, place, meter, around=job.around, last=last, description="compile")
        stream.run([batch.inputs for batch in batches], lambda index, output: None)
        job.writer.write_rest()
        counted = sum(len(item.input_ids) for item in tokens)
        workspace = workspace_bytes(streamed, ranks, max(batch.targets.numel() for batch in batches))
        report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
        result = job.result(output, report)
        settings = {"ratio": ratio, "samples": samples, "max_length": max_length, "seed": seed}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        figures = {
            "calibration": {"digest": tokens_digest(tokens), "samples": len(tokens), "tokens": counted},
            "settings": {**settings, "batch_size": batch_size, "device": str(place), "rank_allocation": "uniform"},
            "dense": [{"name": name, "reason": reason} for name, reason in job.dense.items()],
            "versions": {**versions, "transformers": transformers.__version__},
            **result.model_dump(mode="json", exclude={"output", "linears"}),
        }
        job.writer.finish(base, figures)
    return result


def choose_ranks(streamed: StreamedModel, ratio: float) -> dict[str, int]:
    """The rank of every linear of the repeated layers that is worth factorising, by runtime module name.

    Raises `InputError` where there is none.
    """
    ranks = {}
    for unit in streamed.units:
        shapes = {name: weight_shape(module) for name, module in unit_linears(unit)}
        total = sum(out_features * in_features for out_features, in_features in shapes.values())
        for name, (out_features, in_features) in shapes.items():
            rank = rank_for(ratio, out_features, in_features)
            if unit.is_block and rank is not None and out_features * in_features >= SMALL_SHARE * total:
                ranks[name] = rank
    if not ranks:
        kind = type(streamed.model).__name__
        raise InputError(f"{streamed.checkpoint.directory}: {kind} has no linears in repeated layers to factorise")
    return ranks


def unit_linears(unit: Unit) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linears below a unit by runtime module name."""
    for name, module in unit.module.named_modules():
        if is_linear(module):
            yield (f"{unit.name}.{name}" if name else unit.name), module


def workspace_bytes(streamed: StreamedModel, ranks: dict[str, int], batch_tokens: int) -> int:
    """What compile holds beside the weights of the largest unit, predicted from shapes alone.

    Moments of the unit and the solver's copies of the widest linear, both in float64, the inputs and outputs of the
    unit's linears for one micro-batch and, on a host that is the device too, the unit that is read ahead.
    """
    worst = 0
    for unit in streamed.units:
        shapes = [weight_shape(module) for name, module in unit_linears(unit) if name in ranks]
        moments = sum(8 * min(shape) ** 2 for shape in shapes)
        solver = max((8 * (4 * min(shape) ** 2 + 4 * shape[0] * shape[1]) for shape in shapes), default=0)
        batch = batch_tokens * sum(out_features + in_features for out_features, in_features in shapes) * 8
        worst = max(worst, moments + solver + batch + unit.weight_bytes)
    return worst


class _Compilation:
    """The state of one pass: which linears get which rank, what was written, what stayed dense and why."""

    def __init__(
        self, streamed: StreamedModel, ranks: dict[str, int], writer: EmulatorWriter, device: torch.device
    ) -> None:
        self.streamed = streamed
        self.ranks = ranks
        self.writer = writer
        self.device = device
        self.dense: dict[str, str] = dict.fromkeys(ranks, "never visited by the calibration data")
        self._hooks: dict[Unit, MomentHooks] = {}

    @contextmanager
    def around(self, unit: Unit) -> Iterator[Any]:
        """Watch a unit while it runs; when all batches are through, factorise its linears and write its shard."""
        linears = {name: module for name, module in unit_linears(unit) if name in self.ranks}
        hooks = MomentHooks(linears, self.device)
        forward = type(unit.module).forward

        def run(index: int, args: Any, kwargs: Any) -> Any:
            hooks.next_batch()
            return forward(unit.module, *args, **kwargs)

        with hooks.attached():
            yield run
        if linears:
            self.writer.write_unit(unit, dict(self._factors(linears, hooks)))

    def _factors(self, linears: dict[str, torch.nn.Module], hooks: MomentHooks) -> Iterator[tuple[str, Factors]]:
        for name, linear in linears.items():
            moments = hooks.moments.get(name)
            if moments is None:
                self.dense[name] = "never called; its weight may be used in another way"
                continue
            del self.dense[name]
            gram = moments.gram
            if gram.dropped_rows > NON_FINITE_LIMIT * gram.rows:
                raise RuntimeError(
                    f"{name}: {gram.dropped_rows} of {gram.rows} calibration rows are not finite, more than "
                    f"{NON_FINITE_LIMIT:.0%}; check the checkpoint's dtype and the data"
                )
            weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
            assert isinstance(weight, torch.Tensor)
            yield name, factorize(weight, moments, self.ranks[name], self.streamed.dtype)

    def result(self, output: Path, report: Report) -> CompileResult:
        """The figures of the finished pass."""
        blocks = [unit for unit in self.streamed.units if unit.is_block]
        saved = 0
        for unit in blocks:
            for name, module in unit_linears(unit):
                if (found := self.writer.linears.get(name)) is not None:
                    out_features, in_features = weight_shape(module)
                    saved += out_features * in_features - found.rank * (out_features + in_features)
        aliases = self.streamed.aliases
        stored = [name for unit in self.streamed.units for name in unit.parameters] + list(self.streamed.outside)
        before = sum(self.streamed.bare_parameter(name).numel() for name in stored if name not in aliases)
        in_layers = [name for unit in blocks for name in unit.parameters if name not in aliases]
        layers = sum(self.streamed.bare_parameter(name).numel() for name in in_layers)
        return CompileResult(
            output=str(output),
            parameters_before=before,
            parameters_after=before - saved,
            layer_parameters_before=layers,
            layer_parameters_after=layers - saved,
            linears=[
                LinearSummary(name=item.name, rank=item.rank, error=item.error, optimal_error=item.optimal_error)
                for item in self.writer.linears.values()
            ],
            report=report,
        )
