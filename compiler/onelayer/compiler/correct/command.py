"""An adapter trained on an emulator in, the adapter for the original out (EMLoC, arXiv 2506.12015, stage 3).

One linear at a time: its weight from the original's checkpoint, its factors from the emulator's files, and nothing
else; the original is read once. The adapter given is left as it is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapters.fit import check_fit
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.adapters.writer import Base, write_adapter
from onelayer.compiler.correct.candidates import Candidate, CorrectionSettings, Solver
from onelayer.compiler.correct.correction import Correction, Gap
from onelayer.compiler.correct.gaps import correct_workspace, measure_gaps
from onelayer.compiler.correct.trials import Choice, HeldOut, score_candidates
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.threads import single_threaded
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.results import Report, Result
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import atomic_directory, check_output

PAPER_LIMIT = 3.0


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
    """What `correct_adapter` did, with which limit, solver and scale; `candidates` says what they were chosen from.

    `provenance_checked` tells whether the adapter named the emulator it came from.
    """

    output: str
    limit: float | None
    solver: Solver
    scale: float
    linears: list[CorrectedLinear]
    candidates: list[Candidate] | None
    provenance_checked: bool
    report: Report


def correct_adapter(
    adapter: str | Path,
    *,
    emulator: str | Path,
    model: str | Path,
    output: str | Path,
    limit: float | Literal["auto", "default"] | None = "default",
    data: DataSource | None = None,
    max_length: int = 512,
    batch_size: int = 1,
    device: str | None = None,
    host_memory_bytes: int | None = None,
) -> CorrectResult:
    """Write to `output` the adapter that does to the original `model` what `adapter` did to `emulator`.

    `limit` bounds the correction of each direction relative to the adapter; None sets no bound; "auto" chooses limit,
    solver and scale by the loss on the held-out `data`, which is read for nothing else, as are the arguments after it.
    By default that is done where there are `data`, and 3 is taken, the paper's limit, where there are none. Raises
    `InputError` where the three do not belong together or the adapter is already corrected.
    """
    limit = (PAPER_LIMIT if data is None else "auto") if limit == "default" else limit
    _check_limit(limit, data)
    output = Path(output)
    check_output(output)
    source, small = Adapter.open(resolve_model(adapter)), Emulator.open(emulator)
    directory = resolve_model(model, small.facts.base_revision)
    checked = _check_pairs(source, small, directory)
    held_out = None if data is None else HeldOut(data, max_length, batch_size, pick_device(device), host_memory_bytes)
    with Meter(torch.device("cpu") if held_out is None else held_out.device) as meter:
        streamed = StreamedModel(directory)
        modules = check_fit(source, streamed)
        _check_shapes(source, small, directory)
        choice = None if held_out is None else score_candidates(source, small, directory, held_out, meter)
        chosen = _chosen(limit) if choice is None else choice.best
        base = _base(small, model, streamed, modules.values())
        with single_threaded(), atomic_directory(output) as partial:
            solved = _solve(streamed, small, source, chosen, {} if choice is None else choice.gaps, meter)
            figures = [_figure(name, module.rank, solved.get(name)) for name, module in source.modules.items()]
            record = _provenance(source, small, base, chosen, figures, choice)
            factors = {name: _factors(source, name, solved.get(name), chosen.scale) for name in source.modules}
            write_adapter(partial, factors, source=source, base=base, provenance=record)
        report = _report(streamed, small, source, choice, meter)
    return CorrectResult(
        output=str(output),
        limit=chosen.limit,
        solver=chosen.solver,
        scale=chosen.scale,
        linears=figures,
        candidates=None if choice is None else choice.candidates,
        provenance_checked=checked,
        report=report,
    )


def _check_limit(limit: float | str | None, data: DataSource | None) -> None:
    if isinstance(limit, str) and limit != "auto":
        raise InputError(f"--limit {limit}: must be a number, none, auto or default")
    if limit == "auto" and data is None:
        raise InputError("--limit auto: chooses by the loss on held-out data; name some with --data")
    if limit != "auto" and data is not None:
        raise InputError(f"--data: serves only --limit auto, not --limit {limit}; leave it out")
    if isinstance(limit, float | int) and not 0 <= limit < float("inf"):
        raise InputError(f"--limit {limit}: must be at least 0; leave the bound out with none")


def _chosen(limit: float | str | None) -> CorrectionSettings:
    """The paper's correction."""
    assert not isinstance(limit, str)
    return CorrectionSettings(solver="span", limit=limit, scale=1.0)


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
    small.check_original(model)
    return trained_on is not None


def _check_shapes(source: Adapter, small: Emulator, model: Path) -> None:
    for name, module in source.modules.items():
        if name in small.facts.compressed and small.shape(name) != (module.out_features, module.in_features):
            raise InputError(
                f"{small.directory}: {name} is {small.shape(name)}, but {model} and the adapter have "
                f"{(module.out_features, module.in_features)}; compile the emulator again"
            )


def _solve(
    streamed: StreamedModel,
    small: Emulator,
    source: Adapter,
    chosen: CorrectionSettings,
    gaps: dict[str, Gap],
    meter: Meter,
) -> dict[str, Correction]:
    """The corrections of every compressed module; weights whose gaps are not known yet are read, once, and dropped."""
    solved = {name: gap.limited(chosen.limit).scaled(chosen.scale) for name, gap in gaps.items()}
    names = [name for name in source.modules if name in small.facts.compressed and name not in gaps]
    for name, gap in measure_gaps(streamed, small, source, names, meter):
        solved[name] = gap.limited(chosen.limit).scaled(chosen.scale)
    return solved


def _figure(name: str, rank: int, solved: Correction | None) -> CorrectedLinear:
    if solved is None:  # the emulator has the original's own weight: D = 0
        return CorrectedLinear(name=name, rank=rank, compressed=False, ratio_mean=0.0, clamped=0)
    finite = solved.ratios[solved.ratios.isfinite()]
    return CorrectedLinear(
        name=name,
        rank=len(solved.a),
        compressed=True,
        ratio_mean=float(finite.mean()) if len(finite) else None,
        clamped=solved.clamped,
    )


def _factors(source: Adapter, name: str, solved: Correction | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    if solved is not None:
        return solved.a.float(), solved.b.float()
    a, b = source.factors(name)
    return a, scale * source.modules[name].scaling * b


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
    source: Adapter,
    small: Emulator,
    base: Base,
    chosen: CorrectionSettings,
    figures: list[CorrectedLinear],
    choice: Choice | None,
) -> dict[str, Any]:
    record = {
        "kind": "adapter",
        "corrected": True,
        "base": {"model": base.model, "revision": base.revision, "digest": small.facts.base_digest},
        "emulator": {"digest": small.digest},
        "source_adapter": {"digest": adapter_digest(source.directory)},
        "limit": chosen.limit,
        "solver": chosen.solver,
        "scale": chosen.scale,
        "linears": [figure.model_dump(mode="json") for figure in figures],
    }
    if choice is not None:
        record["validation"] = choice.validation
        record["candidates"] = [candidate.model_dump(mode="json") for candidate in choice.candidates]
    return record


def _report(streamed: StreamedModel, small: Emulator, source: Adapter, choice: Choice | None, meter: Meter) -> Report:
    workspace = correct_workspace(streamed, small, source)
    bytes_read = streamed.checkpoint.bytes_read + small.checkpoint.bytes_read
    if choice is not None:
        workspace = max(workspace, choice.workspace_bytes)
        bytes_read += choice.bytes_read
    return meter.report(streamed.largest_unit_bytes, workspace, bytes_read)
