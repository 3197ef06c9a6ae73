"""An original and adapters for it in, the merged checkpoint out: shard by shard, everything else byte for byte.

Held: some blocks of rows of a few weights, and the adapters' factors of those weights. The original is read once. A
merge that was stopped goes on with the unfinished shards.

Letters: R rank of all adapters together, out / in features.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.adapters.fit import check_made_for
from onelayer.compiler.adapters.merge_plan import Change, Part, plan_changes
from onelayer.compiler.adapters.reader import PROVENANCE_FILE, Adapter, adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.machine.meter import GIB, Meter
from onelayer.compiler.machine.threads import read_ahead, single_threaded
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.transformers_models import FLOAT_DTYPES
from onelayer.compiler.results import Report, Result
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.files import check_output, copy_companions, read_json, write_json
from onelayer.compiler.storage.safetensors_format import TensorInfo
from onelayer.compiler.storage.safetensors_writer import Entry, copy_entry, tensor_entry, write_index, write_safetensors
from onelayer.compiler.storage.work_directory import WorkKind, publish_work, work_directory

# A weight is read by rows in chunks of about this size, and changed by blocks of this size in float32, which stay in a
# core's cache.
CHUNK_BYTES = 8 << 20
BLOCK_BYTES = 1 << 20
# A hidden record is no part of a model, should it ever stay.
MERGE_WORK = WorkKind(
    "merge", finished="[!.]*.safetensors", record=".merge.json", refused=None, busy="is merging it now"
)
# Chunks of a weight that are worked on at once, and shards: while one is flushed to the disk, the next is computed.
CHUNKS_AT_ONCE = SHARDS_AT_ONCE = 2


class MergeResult(Result):
    """What `merge_adapter` did: how many tensors it changed and how many it copied as they were.

    `corrected` is false if an adapter was trained on an emulator and never corrected, null if none needed to be.
    """

    output: str
    corrected: bool | None
    changed: int
    copied: int
    report: Report


def merge_adapter(
    adapter: str | Path | Sequence[str | Path],
    *,
    model: str | Path,
    output: str | Path,
    weight: Sequence[float] | None = None,
) -> MergeResult:
    """Write to `output` the original `model` with `adapter`, or several, merged into it, rounded once to its dtype.

    What each adapter adds is multiplied by its `weight`, 1 by default. Raises `InputError` if an adapter was made
    for another original, or any of its keys has no place to go.
    """
    output = Path(output)
    check_output(output)
    parts, directory = _parts(adapter, weight), resolve_model(model)
    base_digest = model_digest(directory)
    for part in parts:
        check_made_for(part.source, directory, base_digest)
    corrected = [_corrected(part.source, base_digest) for part in parts]
    record = _provenance(parts, model, base_digest, corrected)
    with Meter(torch.device("cpu")) as meter:
        streamed = StreamedModel(directory)
        checkpoint = streamed.checkpoint
        changes = plan_changes(parts, streamed)
        with work_directory(output, MERGE_WORK, record) as work, single_threaded():
            _check_space(output, work, checkpoint)
            _write_shards(work, checkpoint, changes, meter)
            copy_companions(directory, work)
            write_json(work / PROVENANCE_FILE, record)
            publish_work(work, MERGE_WORK, output)
        report = meter.report(streamed.largest_unit_bytes, _workspace_bytes(checkpoint, changes), checkpoint.bytes_read)
    needed = [state for state in corrected if state is not None]
    return MergeResult(
        output=str(output),
        corrected=all(needed) if needed else None,
        changed=len(changes),
        copied=len(checkpoint.tensors) - len(changes),
        report=report,
    )


def _parts(adapter: str | Path | Sequence[str | Path], weight: Sequence[float] | None) -> list[Part]:
    paths = [adapter] if isinstance(adapter, str | Path) else list(adapter)
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


def _workspace_bytes(checkpoint: Checkpoint, changes: dict[str, Change]) -> int:
    """Count what every shard holds at once of the largest changed tensor.

    That is its chunks as read, as changed and waiting to be written, and a block of each in float32.
    """
    largest = max(checkpoint.tensors[key].size_bytes for key in changes)
    return SHARDS_AT_ONCE * ((3 * CHUNKS_AT_ONCE + 1) * min(CHUNK_BYTES, largest) + CHUNKS_AT_ONCE * BLOCK_BYTES)


def _check_space(output: Path, work: Path, checkpoint: Checkpoint) -> None:
    missing = [file for file in checkpoint.files if not (work / file.name).exists()]
    needed, free = sum(file.stat().st_size for file in missing), shutil.disk_usage(work).free
    if free < needed:
        raise InputError(
            f"{output}: needs {needed / GIB:.1f} GiB and has {free / GIB:.1f} GiB; make room or choose another --output"
        )


def _write_shards(target: Path, checkpoint: Checkpoint, changes: dict[str, Change], meter: Meter) -> None:
    """Write the same tensors to files of the same names, except files that are there already; then the index."""
    # The name is enough: a shard gets it when it is complete.
    missing = [file for file in checkpoint.files if not (target / file.name).exists()]
    jobs = (partial(_write_shard, target, file, checkpoint, changes) for file in missing)
    with Progress(len(missing), "merge") as progress:
        for count, file in enumerate(read_ahead(jobs, SHARDS_AT_ONCE, SHARDS_AT_ONCE), start=1):
            progress.reached(count, file.name, meter.sample())
    if checkpoint.index_file is not None:
        tensors = checkpoint.tensors.values()
        metadata = read_json(checkpoint.index_file).get("metadata") or {}
        weight_map = {info.name: info.file.name for info in tensors}
        write_index(target / checkpoint.index_file.name, weight_map, sum(info.size_bytes for info in tensors), metadata)


def _write_shard(target: Path, file: Path, checkpoint: Checkpoint, changes: dict[str, Change]) -> Path:
    inside = [info for info in checkpoint.tensors.values() if info.file == file]
    entries = [
        _changed_entry(checkpoint, info, changes[info.name]) if info.name in changes else copy_entry(info.name, info)
        for info in inside
    ]
    write_safetensors(target / file.name, entries, checkpoint.metadata[file])
    return file


def _changed_entry(checkpoint: Checkpoint, info: TensorInfo, change: Change) -> Entry:
    dtype = FLOAT_DTYPES[info.dtype]
    if not info.shape:
        assert change.dense is not None, "a scalar is only ever replaced"
        source, key = change.dense
        return tensor_entry(info.name, source.read(key).to(dtype))

    def chunks() -> Iterator[bytes | memoryview]:
        for chunk in _changed_rows(checkpoint, info, change):
            yield from tensor_entry(info.name, chunk).chunks()

    return Entry(info.name, info.dtype, info.shape, chunks)


def _changed_rows(checkpoint: Checkpoint, info: TensorInfo, change: Change) -> Iterator[torch.Tensor]:
    """Yield the changed tensor by chunks of rows, rounded once to its dtype."""
    dtype, rows = FLOAT_DTYPES[info.dtype], info.shape[0]
    product = change.product() if change.lora else None
    step = max(1, CHUNK_BYTES // (dtype.itemsize * prod(info.shape[1:])))

    def work(start: int) -> torch.Tensor:
        stop = min(start + step, rows)
        source, key = change.dense or (checkpoint, info.name)
        chunk = source.read_rows(key, start, stop)
        merged = chunk.to(dtype) if product is None else _added(chunk, product, start, dtype)
        if change.rows is not None:
            replaced, key, numbers = change.rows
            inside = [position for position, row in enumerate(numbers) if start <= row < stop]
            merged[[numbers[position] - start for position in inside]] = replaced.read(key)[inside].to(dtype)
        return merged

    return read_ahead((partial(work, start) for start in range(0, rows, step)), CHUNKS_AT_ONCE, CHUNKS_AT_ONCE)


def _added(
    chunk: torch.Tensor, product: tuple[torch.Tensor, torch.Tensor], start: int, dtype: torch.dtype
) -> torch.Tensor:
    """Add to rows `start`, ... of a weight those of left (rows, R) @ right (R, width), in float32 or better."""
    wide = torch.promote_types(torch.promote_types(chunk.dtype, dtype), torch.float32)
    left, right = (part.to(wide) for part in product)
    merged = torch.empty(chunk.shape, dtype=dtype)
    step = max(1, BLOCK_BYTES // (wide.itemsize * chunk.shape[1]))
    buffer = torch.empty(min(step, len(chunk)), chunk.shape[1], dtype=wide)
    for first in range(0, len(chunk), step):
        block = buffer[: min(step, len(chunk) - first)].copy_(chunk[first : first + step])
        block.addmm_(left[start + first : start + first + len(block)], right)
        merged[first : first + step].copy_(block)
    return merged


def _provenance(
    parts: Sequence[Part], model: str | Path, base_digest: str, corrected: Sequence[bool | None]
) -> dict[str, Any]:
    adapters = [
        {"digest": adapter_digest(part.source.directory), "weight": part.weight, "corrected": state}
        for part, state in zip(parts, corrected, strict=True)
    ]
    return {"kind": "merged", "base": {"model": str(model), "digest": base_digest}, "adapters": adapters}
