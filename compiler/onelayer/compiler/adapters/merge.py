"""An original and adapters for it in, the merged checkpoint out: shard by shard, everything else byte for byte.

The original is read once. A merge that was stopped goes on with the unfinished shards.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.adapters.fit import check_made_for
from onelayer.compiler.adapters.merge_plan import Part, plan_changes
from onelayer.compiler.adapters.merge_shards import merge_workspace, remove_records, shards_of, write_shards
from onelayer.compiler.adapters.reader import PROVENANCE_FILE, Adapter, adapter_digest
from onelayer.compiler.dequantize.formats import without_quantization
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.meter import GIB, Meter
from onelayer.compiler.machine.threads import single_threaded
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.results import Report, Result
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.companions import check_companions, copy_companions
from onelayer.compiler.storage.files import check_output, write_json
from onelayer.compiler.storage.model_config import read_model_config, write_model_config
from onelayer.compiler.storage.work_directory import WorkKind, publish_work, work_directory

# A hidden record is no part of a model, should it ever stay.
MERGE_WORK = WorkKind(
    "merge", finished="[!.]*.safetensors", record=".merge.json", refused=None, busy="is merging it now"
)


class MergeResult(Result):
    """What `merge_adapter` did: how many tensors it changed, and how many others it copied or unpacked.

    `corrected` is false if an adapter was trained on an emulator and never corrected, null if none needed to be.
    """

    output: str
    corrected: bool | None
    changed: int
    copied: int
    unpacked: int
    report: Report


def merge_adapter(
    adapter: str | Path | Sequence[str | Path],
    *,
    model: str | Path,
    output: str | Path,
    weight: Sequence[float] | None = None,
) -> MergeResult:
    """Write to `output` the original `model` with `adapter`, or several, merged into it, rounded once to its dtype.

    Weights of a quantized original are written unpacked, in the dtype that its config.json names. What each adapter
    adds is multiplied by its `weight`, 1 by default. Raises `InputError` if an adapter was made
    for another original, or any of its keys has no place to go.
    """
    output = Path(output)
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    check_output(output, model, *adapters)
    parts, directory = _parts(adapters, weight), resolve_model(model)
    check_companions(directory)
    streamed = StreamedModel(directory)
    base_digest = model_digest(directory)
    for part in parts:
        check_made_for(part.source, directory, base_digest)
    corrected = [_corrected(part.source, base_digest) for part in parts]
    for part, state in zip(parts, corrected, strict=True):
        if state is False:
            notice(
                f"{part.source.directory}: was trained on an emulator and is not corrected for {model}; merge what "
                "onelayer correct makes of it instead"
            )
    record = _provenance(parts, model, base_digest, corrected)
    with Meter(torch.device("cpu")) as meter:
        checkpoint = streamed.checkpoint
        if checkpoint.quantization is not None:
            notice(f"{model}: {checkpoint.quantization} weights are unpacked, {output} holds plain {streamed.dtype}")
        changes = plan_changes(parts, streamed)
        with work_directory(output, MERGE_WORK, record) as work, single_threaded():
            _check_space(output, work, checkpoint)
            inputs = [checkpoint.stamps, *(part.source.stamps for part in parts)]
            write_shards(work, checkpoint, changes, inputs, meter)
            copy_companions(directory, work)
            if checkpoint.quantization is not None:
                _write_plain_config(work, streamed.dtype)
            write_json(work / PROVENANCE_FILE, record)
            for stamps in inputs:
                stamps.check()
            remove_records(work)
            publish_work(work, MERGE_WORK, output)
        report = meter.report(streamed.largest_unit_bytes, merge_workspace(checkpoint, changes), checkpoint.bytes_read)
    needed = [state for state in corrected if state is not None]
    unpacked = sum(checkpoint.is_packed(name) for name in checkpoint.tensors.keys() - changes.keys())
    return MergeResult(
        output=str(output),
        corrected=all(needed) if needed else None,
        changed=len(changes),
        copied=len(checkpoint.tensors) - len(changes) - unpacked,
        unpacked=unpacked,
        report=report,
    )


def _write_plain_config(directory: Path, dtype: torch.dtype) -> None:
    """Change a copied config.json to that of plain weights in `dtype`."""
    document = without_quantization(read_model_config(directory))
    write_model_config(directory, {**document, "dtype": str(dtype).removeprefix("torch.")})


def _parts(paths: Sequence[str | Path], weight: Sequence[float] | None) -> list[Part]:
    weights = [1.0] * len(paths) if not weight else list(weight)
    if not paths or len(weights) != len(paths):
        raise InputError(f"--weight: {len(weights)} given for {len(paths)} adapters; give one for each, or none")
    if bad := [value for value in weights if not math.isfinite(value)]:
        raise InputError(f"--weight {bad[0]}: must be a finite number")
    return [Part(Adapter.open(resolve_model(path)), value) for path, value in zip(paths, weights, strict=True)]


def _corrected(source: Adapter, base_digest: str) -> bool | None:
    """Whether an adapter was corrected; None if it needed no correction: made elsewhere, or trained on this model."""
    if source.provenance is None or source.recorded_digest("trained_on") == base_digest:
        return None
    return bool(source.provenance.get("corrected"))


def _check_space(output: Path, work: Path, checkpoint: Checkpoint) -> None:
    missing = [tensors for shard, tensors in shards_of(checkpoint).items() if not (work / shard).exists()]
    needed = sum(info.size_bytes for tensors in missing for info in tensors)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise InputError(
            f"{output}: needs {needed / GIB:.1f} GiB and has {free / GIB:.1f} GiB; make room or choose another --output"
        )


def _provenance(
    parts: Sequence[Part], model: str | Path, base_digest: str, corrected: Sequence[bool | None]
) -> dict[str, Any]:
    adapters = [
        {"digest": adapter_digest(part.source.directory), "weight": part.weight, "corrected": state}
        for part, state in zip(parts, corrected, strict=True)
    ]
    return {"kind": "merged", "base": {"model": str(model), "digest": base_digest}, "adapters": adapters}
