"""Named tensors in, one safetensors file out: streamed, so memory stays the same for a file of any size."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import BUFFER_BYTES, sync, write_json
from onelayer.compiler.storage.safetensors_format import DTYPE_BITS, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be: what its header says, and its bytes, produced only when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def size_bytes(self) -> int:
        """The bytes that `dtype` and `shape` demand."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def tensor_entry(name: str, tensor: "torch.Tensor") -> Entry:
    """An entry for a tensor in memory (any device); it is held until the file is written."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in TORCH_NAMES:
        raise InputError(f"{name}: {tensor.dtype} cannot be stored as safetensors; convert the tensor first")

    def chunks() -> Iterator[memoryview]:
        import torch

        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data

    return Entry(name, TORCH_NAMES[dtype], tuple(tensor.shape), chunks)


def copy_entry(name: str, info: TensorInfo) -> Entry:
    """An entry that copies the stored bytes of another checkpoint's tensor, whatever their dtype."""

    def chunks() -> Iterator[bytes]:
        remaining = info.size_bytes
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            while remaining and (block := file.read(min(remaining, BUFFER_BYTES))):
                remaining -= len(block)
                yield block

    return Entry(name, info.dtype, info.shape, chunks)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Build the length-prefixed JSON header, padded with spaces so that the first tensor starts at a multiple of 8."""
    # transformers refuses a file that does not name the framework that laid out its tensors.
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> str:
    """Write `entries` to `path`, aside, flushed and renamed, so `path` exists only when complete; return its SHA-256.

    Entries are stored widest dtype first, as the format's own writer does, which keeps every tensor aligned.
    """
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names), f"{path}: a tensor name is given twice"
    assert "__metadata__" not in names
    ordered = sorted(entries, key=lambda entry: -DTYPE_BITS[entry.dtype])
    partial = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            header = _header(ordered, metadata)
            digest.update(header)
            file.write(header)
            for entry in ordered:
                written = 0
                for chunk in entry.chunks():
                    digest.update(chunk)
                    written += file.write(chunk)
                if written != entry.size_bytes:
                    raise RuntimeError(f"{path}: {entry.name} delivered {written} bytes of {entry.size_bytes}")
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_index(
    path: Path, weight_map: Mapping[str, str], total_size_bytes: int, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a shard index: tensor name to file name. Further `metadata` of a source index is kept."""
    assert all(Path(file).name == file for file in weight_map.values()), "an index names files of its own directory"
    document = {
        "metadata": {**(metadata or {}), "total_size": total_size_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(path, document)
