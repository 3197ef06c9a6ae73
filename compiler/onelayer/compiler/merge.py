"""An original and an adapter for it in, the merged checkpoint out: shard by shard, everything else byte for byte.

Held: a block of rows of one weight, and the adapter's factors of that weight. The original is read once.

Letters: r rank, out / in features.
"""

import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.adapter import PROVENANCE_FILE, Adapter, adapter_digest
from onelayer.compiler.checkpoint import Checkpoint, TensorInfo, model_digest, resolve_model
from onelayer.compiler.companions import copy_companions
from onelayer.compiler.compat import FLOAT_DTYPES
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import atomic_directory, check_output, read_json, write_json
from onelayer.compiler.measure import GIB, Meter, Progress, Report, Result
from onelayer.compiler.merge_plan import Change, plan_changes
from onelayer.compiler.units import StreamedModel
from onelayer.compiler.writer import Entry, copy_entry, tensor_entry, write_index, write_safetensors

# A weight is changed by blocks of rows of about this size in float32.
BLOCK_BYTES = 64 << 20


class MergeResult(Result):
    """What `merge_adapter` did: how many tensors it changed and how many it copied as they were.

    `corrected` is false for an adapter trained on an emulator and never corrected, and null where there was no need.
    """

    output: str
    corrected: bool | None
    changed: int
    copied: int
    report: Report


def merge_adapter(adapter: str | Path, *, model: str | Path, output: str | Path) -> MergeResult:
    """Write to `output` the original `model` with `adapter` merged into its weights, rounded once to their dtype.

    Raises `InputError` where the adapter was made for another original, or any of its keys has no place to go.
    """
    output = Path(output)
    check_output(output)
    source, directory = Adapter.open(resolve_model(adapter)), resolve_model(model)
    base_digest = model_digest(directory)
    _check_pair(source, directory, base_digest)
    corrected = _corrected(source, base_digest)
    with Meter(torch.device("cpu")) as meter:
        streamed = StreamedModel(directory)
        checkpoint = streamed.checkpoint
        changes = plan_changes(source, streamed)
        _check_space(output, checkpoint)
        with atomic_directory(output) as partial:
            copy_companions(directory, partial)
            _write_shards(partial, source, checkpoint, changes, meter)
            write_json(partial / PROVENANCE_FILE, _provenance(source, model, base_digest, corrected))
        report = meter.report(streamed.largest_unit_bytes, _workspace_bytes(checkpoint, changes), checkpoint.bytes_read)
    copied = len(checkpoint.tensors) - len(changes)
    return MergeResult(output=str(output), corrected=corrected, changed=len(changes), copied=copied, report=report)


def _check_pair(source: Adapter, model: Path, base_digest: str) -> None:
    made_for = source.recorded_digest("base")
    if made_for is not None and made_for != base_digest:
        raise InputError(
            f"{source.directory}: was made for another original ({made_for[:12]}) than {model} ({base_digest[:12]}); "
            "give the model it was made for"
        )


def _corrected(source: Adapter, base_digest: str) -> bool | None:
    """None for an adapter that needed no correction: made elsewhere, or trained on this very model."""
    if source.provenance is None or source.recorded_digest("trained_on") == base_digest:
        return None
    return bool(source.provenance.get("corrected"))


def _workspace_bytes(checkpoint: Checkpoint, changes: dict[str, Change]) -> int:
    """A block of the largest changed tensor: as read, in float32 with its delta, and rounded."""
    largest = max(4 * prod(checkpoint.tensors[key].shape) for key in changes)
    return 4 * min(BLOCK_BYTES, largest)


def _check_space(output: Path, checkpoint: Checkpoint) -> None:
    parent = next(path for path in output.absolute().parents if path.exists())
    needed, free = sum(file.stat().st_size for file in checkpoint.files), shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{output}: needs {needed / GIB:.1f} GiB and has {free / GIB:.1f} GiB; make room or choose another --output"
        )


def _write_shards(
    target: Path, source: Adapter, checkpoint: Checkpoint, changes: dict[str, Change], meter: Meter
) -> None:
    """The same tensors in files of the same names, then the index."""
    with Progress(len(checkpoint.files), "merge") as progress:
        for count, file in enumerate(checkpoint.files):
            progress.reached(count, file.name, meter.sample())
            inside = [info for info in checkpoint.tensors.values() if info.file == file]
            entries = [
                _changed_entry(source, checkpoint, info, changes[info.name])
                if info.name in changes
                else copy_entry(info.name, info)
                for info in inside
            ]
            write_safetensors(target / file.name, entries, checkpoint.metadata[file])
    if checkpoint.index_file is not None:
        tensors = checkpoint.tensors.values()
        metadata = read_json(checkpoint.index_file).get("metadata") or {}
        weight_map = {info.name: info.file.name for info in tensors}
        write_index(target / checkpoint.index_file.name, weight_map, sum(info.size_bytes for info in tensors), metadata)


def _changed_entry(source: Adapter, checkpoint: Checkpoint, info: TensorInfo, change: Change) -> Entry:
    dtype = FLOAT_DTYPES[info.dtype]
    if not info.shape:
        assert change.dense is not None, "a scalar is only ever replaced"
        return tensor_entry(info.name, source.read(change.dense).to(dtype))

    def chunks() -> Iterator[bytes | memoryview]:
        for block in _changed_rows(source, checkpoint, info, change):
            yield from tensor_entry(info.name, block.to(dtype)).chunks()

    return Entry(info.name, info.dtype, info.shape, chunks)


def _changed_rows(source: Adapter, checkpoint: Checkpoint, info: TensorInfo, change: Change) -> Iterator[torch.Tensor]:
    """The changed tensor by blocks of rows, computed in float32 (in float64 where it is stored so)."""
    wide = torch.float64 if info.dtype == "F64" else torch.float32
    delta = None if change.lora is None else _delta(source, change.lora, change.transposed)
    step = max(1, BLOCK_BYTES // (4 * prod(info.shape[1:])))
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        if change.dense is None:
            block = checkpoint.read_rows(info.name, start, stop).to(wide)
        else:
            block = source.read_rows(change.dense, start, stop).to(wide)
        if delta is not None:
            block += delta(start, stop)
        if change.rows is not None:
            key, numbers = change.rows
            inside = [position for position, row in enumerate(numbers) if start <= row < stop]
            block[[numbers[position] - start for position in inside]] = source.read(key)[inside].to(wide)
        yield block


def _delta(source: Adapter, name: str, transposed: bool) -> Callable[[int, int], torch.Tensor]:
    """Rows of scaling * B A, or of its transpose, in float32."""
    a, b = source.factors(name)
    left, right = (a.T, b.T) if transposed else (b, a)
    scaling = source.modules[name].scaling
    return lambda start, stop: left[start:stop] @ right * scaling


def _provenance(source: Adapter, model: str | Path, base_digest: str, corrected: bool | None) -> dict[str, Any]:
    return {
        "kind": "merged",
        "base": {"model": str(model), "digest": base_digest},
        "adapter": {"digest": adapter_digest(source.directory), "corrected": corrected},
    }
