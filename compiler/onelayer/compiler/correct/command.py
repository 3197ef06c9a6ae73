"""Correct: turns an adapter trained on an emulator into one for the original (EMLoC, arXiv 2506.12015, stage 3).

It handles one linear at a time and reads only its weight from the original's checkpoint and its factors from the
emulator's files. The original is read once. The given adapter is not changed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onelayer.compiler.adapters.attach import short_targets
from onelayer.compiler.adapters.fit import check_fit
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.adapters.writer import Base, write_adapter
from onelayer.compiler.correct.candidates import Candidate, CorrectionSettings, Solver
from onelayer.compiler.correct.choose import Choice, HeldOut, score_candidates
from onelayer.compiler.correct.correction import Correction, Gap
from onelayer.compiler.correct.gaps import correct_workspace, measure_gaps
from onelayer.compiler.correct.settings import CorrectKeywords, CorrectSettings, chosen_limit
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.threads import single_threaded
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import atomic_directory, check_output


class CorrectedLinear(Result):
    """Figures of one corrected module.

    `ratio_mean` is the mean of |D| / |B'| over its directions before the clamp; None if B' is zero. `clamped` counts
    the directions that were clamped, `rank` the directions of A. `compressed` is false if the emulator kept the
    module's weight, so that nothing changed.
    """

    name: str
    rank: int
    compressed: bool
    ratio_mean: float | None
    clamped: int


class CorrectResult(Result):
    """The result of `correct_adapter`: the limit, solver and scale it used, and the `candidates` it chose from.

    `provenance_checked` says whether the adapter named the emulator that it was trained on.
    """

    output: str
    limit: float | None
    solver: Solver
    scale: float
    linears: list[CorrectedLinear]
    candidates: list[Candidate] | None
    provenance_checked: bool
    report: Report


@settings_keywords(CorrectSettings, CorrectKeywords)
def correct_adapter(
    adapter: str | Path,
    *,
    emulator: str | Path,
    model: str | Path,
    output: str | Path,
    data: DataSource | None = None,
    **settings: Unpack[CorrectKeywords],
) -> CorrectResult:
    """Write to `output` the adapter that does to the original `model` what `adapter` did to `emulator`.

    `limit` bounds the correction of each direction relative to the adapter; None sets no bound. "auto" chooses limit,
    solver and scale by the loss on the held-out `data`; `data` and the other settings serve only this choice. The
    default is "auto" with `data`, and 3, the paper's limit, without. Raises `InputError` if adapter, emulator and model
    do not belong together or the adapter is already corrected.
    """
    asked = CorrectSettings.of(settings)
    limit = chosen_limit(asked.limit, data is not None)
    _check_limit(limit, data)
    output = Path(output)
    check_output(output, adapter, emulator, model)
    given, opened = Adapter.open(resolve_model(adapter)), Emulator.open(emulator)
    directory = resolve_model(model, opened.facts.base_revision)
    streamed = StreamedModel(directory)
    checked = _check_pairs(given, opened, directory)
    held_out = None if data is None else _held_out(data, asked)
    with Meter(torch.device("cpu") if held_out is None else held_out.device) as meter:
        modules = check_fit(given, streamed)
        _check_shapes(given, opened, directory)
        choice = None if held_out is None else score_candidates(given, opened, directory, held_out, meter)
        chosen = _chosen(limit) if choice is None else choice.best

        def publish() -> CorrectResult:
            base = _base(opened, model, streamed, modules.values())
            with single_threaded(), atomic_directory(output) as partial:
                solved = _solve(streamed, opened, given, chosen, {} if choice is None else choice.gaps, meter)
                figures = [_figure(name, module.rank, solved.get(name)) for name, module in given.modules.items()]
                record = _provenance(given, opened, base, chosen, figures, choice)
                factors = {name: _factors(given, name, solved.get(name), chosen.scale) for name in given.modules}
                targets = short_targets(streamed.model, given.modules)
                write_adapter(partial, factors, source=given, base=base, targets=targets, provenance=record)
                for stamps in (given.stamps, opened.checkpoint.stamps, streamed.checkpoint.stamps):
                    stamps.check()
            return CorrectResult(
                output=str(output),
                limit=chosen.limit,
                solver=chosen.solver,
                scale=chosen.scale,
                linears=figures,
                candidates=None if choice is None else choice.candidates,
                provenance_checked=checked,
                report=_report(streamed, opened, given, choice, meter),
            )

        processes().wait()  # others may still look whether the output is free
        return processes().by_first(publish)


def _held_out(data: DataSource, settings: CorrectSettings) -> HeldOut:
    device = pick_device(settings.device)
    return HeldOut(
        data,
        settings.max_length,
        settings.batch_size,
        device,
        settings.host_memory_bytes,
        settings.max_image_pixels,
    )


def _check_limit(limit: float | str | None, data: DataSource | None) -> None:
    if limit == "auto" and data is None:
        raise InputError("--limit auto: chooses by the loss on held-out data; name some with --data")
    if limit != "auto" and data is not None:
        raise InputError(f"--data: serves only --limit auto, not --limit {limit}; leave it out")


def _chosen(limit: float | str | None) -> CorrectionSettings:
    """Return the settings of the paper's correction with this limit."""
    assert not isinstance(limit, str)
    return CorrectionSettings(solver="span", limit=limit, scale=1.0)


def _check_pairs(adapter: Adapter, emulator: Emulator, model: Path) -> bool:
    """Refuse inputs that do not belong together, by digest; return whether the adapter records its emulator."""
    if adapter.provenance is not None and adapter.provenance.get("corrected"):
        raise InputError(f"{adapter.directory}: is already corrected; use it as it is")
    if not adapter.modules:
        raise InputError(f"{adapter.directory}: adapts no module, there is nothing to correct; use it as it is")
    trained_on = adapter.recorded_digest("trained_on")
    if trained_on is not None and trained_on != emulator.digest:
        raise InputError(
            f"{adapter.directory}: was trained on another emulator ({trained_on[:12]}) than {emulator.directory} "
            f"({emulator.digest[:12]}); give the emulator it was trained on"
        )
    emulator.check_original(model)
    return trained_on is not None


def _check_shapes(adapter: Adapter, emulator: Emulator, model: Path) -> None:
    for name, module in adapter.modules.items():
        if name in emulator.facts.compressed and emulator.shape(name) != (module.out_features, module.in_features):
            raise InputError(
                f"{emulator.directory}: {name} is {emulator.shape(name)}, but {model} and the adapter have "
                f"{(module.out_features, module.in_features)}; compile the emulator again"
            )


def _solve(
    streamed: StreamedModel,
    emulator: Emulator,
    adapter: Adapter,
    chosen: CorrectionSettings,
    gaps: dict[str, Gap],
    meter: Meter,
) -> dict[str, Correction]:
    """Compute the correction of every compressed module; read a weight only if its gap is not known yet, and once."""
    solved = {name: gap.limited(chosen.limit).scaled(chosen.scale) for name, gap in gaps.items()}
    names = [name for name in adapter.modules if name in emulator.facts.compressed and name not in gaps]
    for name, gap in measure_gaps(streamed, emulator, adapter, names, meter):
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


def _factors(adapter: Adapter, name: str, solved: Correction | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    if solved is not None:
        return solved.a.float(), solved.b.float()
    a, b = adapter.factors(name)
    return a, scale * adapter.modules[name].scaling * b


def _base(emulator: Emulator, model: str | Path, streamed: StreamedModel, modules: Iterable[nn.Module]) -> Base:
    """Describe the original so that a loader finds it: by the emulator's Hub id, else by the path given here."""
    recorded = emulator.facts.base_model
    is_hub_id = recorded.count("/") <= 1 and not Path(recorded).exists() and not Path(recorded).is_absolute()
    kind = type(streamed.model)
    return Base(
        model=recorded if is_hub_id else str(Path(model).absolute()) if Path(model).exists() else str(model),
        revision=emulator.facts.base_revision,
        class_name=kind.__name__,
        class_module=kind.__module__,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules),
        quantization=streamed.checkpoint.quantization,
    )


def _provenance(
    adapter: Adapter,
    emulator: Emulator,
    base: Base,
    chosen: CorrectionSettings,
    figures: list[CorrectedLinear],
    choice: Choice | None,
) -> dict[str, Any]:
    record = {
        "kind": "adapter",
        "corrected": True,
        "base": {"model": base.model, "revision": base.revision, "digest": emulator.facts.base_digest},
        "emulator": {"digest": emulator.digest},
        "source_adapter": {"digest": adapter_digest(adapter.directory)},
        "limit": chosen.limit,
        "solver": chosen.solver,
        "scale": chosen.scale,
        "linears": [figure.model_dump(mode="json") for figure in figures],
    }
    if choice is not None:
        record["validation"] = choice.validation
        record["candidates"] = [candidate.model_dump(mode="json") for candidate in choice.candidates]
    return record


def _report(
    streamed: StreamedModel, emulator: Emulator, adapter: Adapter, choice: Choice | None, meter: Meter
) -> Report:
    workspace = correct_workspace(streamed, emulator, adapter)
    bytes_read = streamed.checkpoint.bytes_read + emulator.checkpoint.bytes_read
    if choice is not None:
        workspace = max(workspace, choice.workspace_bytes)
        bytes_read += choice.bytes_read
    workspace += streamed.host_bytes(meter.on_gpu)
    return meter.report(streamed.largest_unit_bytes, workspace, bytes_read)
