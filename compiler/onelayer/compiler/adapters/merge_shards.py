"""An original and its changes in, the merged shards out: everything that is not changed, byte for byte.

Held: some blocks of rows of a few weights, and the adapters' factors of those weights.

Letters: R rank of all adapters together, out / in features.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch

from onelayer.compiler.adapters.merge_plan import Change
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.modules import FLOAT_DTYPES
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.machine.threads import read_ahead
from onelayer.compiler.storage.checkpoint import INDEX_FILES, SINGLE_FILES, Checkpoint
from onelayer.compiler.storage.digests import sha256_file
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.compiler.storage.safetensors_format import TensorInfo
from onelayer.compiler.storage.safetensors_writer import Entry, copy_entry, tensor_entry, write_index, write_safetensors
from onelayer.compiler.storage.stamps import FileStamps

# A weight is read by rows in chunks of about this size, and changed by blocks of this size in float32, which stay in a
# core's cache.
CHUNK_BYTES = 8 << 20
BLOCK_BYTES = 1 << 20
# Chunks of a weight that are worked on at once, and shards: while one is flushed to the disk, the next is computed.
CHUNKS_AT_ONCE = SHARDS_AT_ONCE = 2
# Size of a shard that is not one of the original.
SHARD_BYTES = 4 << 30


def merge_workspace(checkpoint: Checkpoint, changes: dict[str, Change]) -> int:
    """Count what every shard holds at once of the largest changed tensor.

    That is its chunks as read, as changed and waiting to be written, and a block of each in float32. A packed weight is
    held whole while it is unpacked.
    """
    largest = max(checkpoint.tensors[key].size_bytes for key in changes)
    chunks = (3 * CHUNKS_AT_ONCE + 1) * min(CHUNK_BYTES, largest) + CHUNKS_AT_ONCE * BLOCK_BYTES
    packed = [info.size_bytes for name, info in checkpoint.tensors.items() if not checkpoint.reads_rows(name)]
    return SHARDS_AT_ONCE * (chunks + max(packed, default=0) + checkpoint.unpacking_bytes)


def write_shards(
    target: Path, checkpoint: Checkpoint, changes: dict[str, Change], inputs: Sequence[FileStamps], meter: Meter
) -> None:
    """Write the same tensors to files of the same names, except finished ones; then the index.

    A shard is finished if its record says so and it still has the recorded digest. Raises `InputError` if one of
    `inputs` has changed since it was opened.
    """
    shards = shards_of(checkpoint)
    missing = {shard: tensors for shard, tensors in shards.items() if not _is_finished(target, shard)}
    jobs = (partial(_write_shard, target / shard, missing[shard], checkpoint, changes, inputs) for shard in missing)
    with Progress(len(missing), "merge") as progress:
        for count, file in enumerate(read_ahead(jobs, SHARDS_AT_ONCE, SHARDS_AT_ONCE), start=1):
            progress.reached(count, file.name, meter.sample())
    index_file = checkpoint.index_file
    if index_file is not None or len(shards) > 1:
        metadata = {} if index_file is None else read_json(index_file).get("metadata") or {}
        weight_map = {info.name: shard for shard, tensors in shards.items() for info in tensors}
        total_bytes = sum(info.size_bytes for info in checkpoint.tensors.values())
        name = INDEX_FILES[0] if index_file is None else index_file.name
        write_index(target / name, weight_map, total_bytes, metadata)


def shards_of(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """Return the tensors of each file that is written: as they are stored, or in shards where they lie in a GGUF file.

    A file without tensors of the model stays.
    """
    stored: dict[str, list[TensorInfo]] = {} if checkpoint.is_gguf else {file.name: [] for file in checkpoint.files}
    if not checkpoint.is_gguf:
        for info in checkpoint.tensors.values():
            stored[info.file.name].append(info)
        return stored
    shards: list[list[TensorInfo]] = [[]]
    for info in checkpoint.tensors.values():
        if shards[-1] and sum(item.size_bytes for item in shards[-1]) + info.size_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(info)
    if len(shards) == 1:
        return {SINGLE_FILES[0]: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": part for n, part in enumerate(shards, start=1)}


def remove_records(target: Path) -> None:
    """Remove the records of finished shards, which are no part of the output."""
    for path in target.glob(_record(target, "*.safetensors").name):
        path.unlink()


def _record(target: Path, shard: str) -> Path:
    return target / f".{shard}.json"


def _is_finished(target: Path, shard: str) -> bool:
    record = _record(target, shard)
    try:
        document = read_json(record) if record.is_file() and (target / shard).is_file() else None
    except InputError:  # damaged like the shard may be: it is written again
        return False
    return isinstance(document, dict) and document.get("sha256") == sha256_file(target / shard)


def _write_shard(
    shard: Path,
    tensors: Sequence[TensorInfo],
    checkpoint: Checkpoint,
    changes: dict[str, Change],
    inputs: Sequence[FileStamps],
) -> Path:
    entries = [_entry(checkpoint, info, changes.get(info.name)) for info in tensors]
    named = (checkpoint.metadata[file] for file in checkpoint.files if file.name == shard.name)
    digest = write_safetensors(shard, entries, next(named, {}))
    for stamps in inputs:
        stamps.check()
    write_json(_record(shard.parent, shard.name), {"sha256": digest})
    return shard


def _entry(checkpoint: Checkpoint, info: TensorInfo, change: Change | None) -> Entry:
    """The entry of one tensor: copied as stored, unpacked if it is packed, or changed."""
    if change is None and not checkpoint.is_packed(info.name):
        return copy_entry(info.name, info)
    dtype = FLOAT_DTYPES[info.dtype]
    if change is not None and not info.shape:
        assert change.replaced is not None, "a scalar is only ever replaced"
        return tensor_entry(info.name, change.replaced.source.read(change.replaced.key).to(dtype))

    def chunks() -> Iterator[bytes | memoryview]:
        for chunk in _changed_rows(checkpoint, info, change or Change()):
            yield from tensor_entry(info.name, chunk).chunks()

    return Entry(info.name, info.dtype, info.shape, chunks)


def _changed_rows(checkpoint: Checkpoint, info: TensorInfo, change: Change) -> Iterator[torch.Tensor]:
    """Yield the changed tensor by chunks of rows, rounded once to its dtype."""
    dtype, rows = FLOAT_DTYPES[info.dtype], info.shape[0]
    product = change.product() if change.lora else None
    step = max(1, CHUNK_BYTES // (dtype.itemsize * prod(info.shape[1:])))
    whole = None if checkpoint.reads_rows(info.name) else checkpoint.read(info.name)

    def work(start: int) -> torch.Tensor:
        stop = min(start + step, rows)
        new = change.replaced
        if new is not None and new.rows is None:
            chunk = new.source.read_rows(new.key, start, stop)
        else:
            chunk = checkpoint.read_rows(info.name, start, stop) if whole is None else whole[start:stop]
        if new is not None and new.rows is not None:
            inside = [position for position, row in enumerate(new.rows) if start <= row < stop]
            chunk[[new.rows[position] - start for position in inside]] = new.source.read(new.key)[inside].to(chunk)
        return chunk.to(dtype) if product is None else _added(chunk, product, start, dtype)

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
