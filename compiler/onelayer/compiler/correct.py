"""An adapter trained on an emulator in, the adapter for the original out (EMLoC, arXiv 2506.12015, stage 3).

One linear at a time: its weight from the original's checkpoint, its factors from the emulator's files, and nothing
else; the original is read once. The adapter given is left as it is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapter import Adapter, adapter_digest
from onelayer.compiler.adapter_fit import check_fit, is_transposed
from onelayer.compiler.adapter_writer import Base, write_adapter
from onelayer.compiler.checkpoint import model_digest, resolve_model
from onelayer.compiler.correction import BLOCK_ROWS, correct_linear
from onelayer.compiler.emulator_reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import atomic_directory, check_output
from onelayer.compiler.measure import Meter, Progress, Report, Result
from onelayer.compiler.units import StreamedModel


class CorrectedLinear(Result):
    """One module: the mean of |D| / |B'| over its directions before the clamp (None: B' is zero), how many it caught.

    `rank` counts the directions of A; `compressed` is false where the emulator kept the module, so nothing changed.
    """

    name: str
    rank: int
    compressed: bool
    ratio_mean: float | None
    clamped: int


class CorrectResult(Result):
    """What `correct_adapter` did; `provenance_checked` tells whether the adapter named the emulator it came from."""

    output: str
    limit: float | None
    linears: list[CorrectedLinear]
    candidates: None = None
    provenance_checked: bool
    report: Report


def correct_adapter(
    adapter: str | Path, *, emulator: str | Path, model: str | Path, output: str | Path, limit: float | None = 3.0
) -> CorrectResult:
    """Write to `output` the adapter that does to the original `model` what `adapter` did to `emulator`.

    `limit` bounds the correction of each direction relative to the adapter (3 in the paper); None sets no bound.
    Raises `InputError` where the three do not belong together or the adapter is already corrected.
    """
    if limit is not None and not 0 <= limit < float("inf"):
        raise InputError(f"--limit {limit}: must be at least 0; leave the bound out with none")
    output = Path(output)
    check_output(output)
    source, small = Adapter.open(resolve_model(adapter)), Emulator.open(emulator)
    directory = resolve_model(model, small.facts.base_revision)
    checked = _check_pairs(source, small, directory)
    with Meter(torch.device("cpu")) as meter:
        streamed = StreamedModel(directory)
        modules = check_fit(source, streamed)
        _check_shapes(source, small, directory)
        factors, figures = _solve(streamed, small, source, limit, meter)
        base = _base(small, model, streamed, modules.values())
        with atomic_directory(output) as partial:
            record = _provenance(source, small, base, limit, figures)
            write_adapter(partial, factors, source=source, base=base, provenance=record)
        bytes_read = streamed.checkpoint.bytes_read + small.checkpoint.bytes_read
        report = meter.report(streamed.largest_unit_bytes, _workspace_bytes(streamed, small, source), bytes_read)
    return CorrectResult(output=str(output), limit=limit, linears=figures, provenance_checked=checked, report=report)


def _check_pairs(source: Adapter, small: Emulator, model: Path) -> bool:
    """Refuse what does not belong together, by digest; true where the adapter says what it was trained on."""
    if source.provenance is not None and source.provenance.get("corrected"):
        raise InputError(f"{source.directory}: is already corrected; use it as it is")
    if not source.modules:
        raise InputError(f"{source.directory}: adapts no module, there is nothing to correct; use it as it is")
    trained_on = source.recorded_digest("trained_on")
    if trained_on is not None and trained_on != small.digest:
        raise InputError(
            f"{source.directory}: was trained on another emulator ({trained_on[:12]}) than {small.directory} "
            f"({small.digest[:12]}); give the emulator it was trained on"
        )
    if (found := model_digest(model)) != small.facts.base_digest:
        raise InputError(
            f"{small.directory}: is an emulator of {small.facts.base_model} ({small.facts.base_digest[:12]}), "
            f"not of {model} ({found[:12]}); give the original it was compiled from"
        )
    return trained_on is not None


def _check_shapes(source: Adapter, small: Emulator, model: Path) -> None:
    for name, module in source.modules.items():
        if name in small.facts.ranks and small.shape(name) != (module.out_features, module.in_features):
            raise InputError(
                f"{small.directory}: {name} is {small.shape(name)}, but {model} and the adapter have "
                f"{(module.out_features, module.in_features)}; compile the emulator again"
            )


def _solve(
    streamed: StreamedModel, small: Emulator, source: Adapter, limit: float | None, meter: Meter
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[CorrectedLinear]]:
    """Factors and figures of every adapted module, in the order in which their weights lie on the disk."""
    factors, figures = {}, []

    def place(name: str) -> tuple[Path, int]:
        info = streamed.checkpoint.tensors[streamed.keys[f"{name}.weight"][0]]
        return info.file, info.start

    with Progress(len(source.modules), "correct") as progress:
        for count, name in enumerate(sorted(source.modules, key=place)):
            progress.reached(count, name, meter.sample())
            factors[name], figure = _solve_one(streamed, small, source, name, limit)
            figures.append(figure)
    return factors, figures


def _solve_one(
    streamed: StreamedModel, small: Emulator, source: Adapter, name: str, limit: float | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], CorrectedLinear]:
    scaling = source.modules[name].scaling
    a, b = source.factors(name)
    if name not in small.facts.ranks:  # the emulator has the original's own weight: D = 0
        figure = CorrectedLinear(name=name, rank=len(a), compressed=False, ratio_mean=0.0, clamped=0)
        return (a, scaling * b), figure
    with streamed.loaded([f"{name}.weight"]) as tensors:
        (weight,) = tensors.values()
        if is_transposed(streamed.model.get_submodule(name)):
            weight = weight.T
        solved = correct_linear(weight, *small.factors(name), a, b, scaling, limit)
    finite = solved.ratios[solved.ratios.isfinite()]
    figure = CorrectedLinear(
        name=name,
        rank=len(solved.a),
        compressed=True,
        ratio_mean=float(finite.mean()) if len(finite) else None,
        clamped=solved.clamped,
    )
    return (solved.a.float(), solved.b.float()), figure


def _base(small: Emulator, model: str | Path, streamed: StreamedModel, modules: Iterable[nn.Module]) -> Base:
    """The original as a loader can find it: the Hub id that the emulator names, else the path given here."""
    recorded = small.facts.base_model
    is_hub_id = recorded.count("/") <= 1 and not Path(recorded).exists() and not Path(recorded).is_absolute()
    kind = type(streamed.model)
    return Base(
        model=recorded if is_hub_id else str(Path(model).absolute()) if Path(model).exists() else str(model),
        revision=small.facts.base_revision,
        class_name=kind.__name__,
        class_module=kind.__module__,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules),
    )


def _provenance(
    source: Adapter, small: Emulator, base: Base, limit: float | None, figures: list[CorrectedLinear]
) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "corrected": True,
        "base": {"model": base.model, "revision": base.revision, "digest": small.facts.base_digest},
        "emulator": {"digest": small.digest},
        "source_adapter": {"digest": adapter_digest(source.directory)},
        "limit": limit,
        "solver": "span",
        "linears": [figure.model_dump(mode="json") for figure in figures],
    }


def _workspace_bytes(streamed: StreamedModel, small: Emulator, source: Adapter) -> int:
    """What the largest linear costs at most: weight, a block of it and factors in float64, and four (out, r)."""

    def cost(name: str) -> int:
        module, rank = source.modules[name], small.facts.ranks[name]
        weight = streamed.bare_parameter(f"{name}.weight")
        wide = BLOCK_ROWS * module.in_features + rank * (module.in_features + module.out_features)
        wide += 4 * module.rank * (module.in_features + module.out_features)
        return weight.numel() * weight.element_size() + 8 * wide

    return max((cost(name) for name in source.modules if name in small.facts.ranks), default=0)
