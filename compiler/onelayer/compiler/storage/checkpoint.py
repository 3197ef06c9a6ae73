"""Safetensors in: a model directory becomes a checked table of tensors that are read one at a time.

Every header is hostile until checked: sizes, offsets, dtypes and shapes must agree with the file before a byte of
weight is read, and an index cannot name a file outside its directory. Only safetensors are read, never a pickle.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.companions import companions
from onelayer.compiler.storage.digests import file_digest, sha256_file, sha256_json
from onelayer.compiler.storage.files import check_directory, read_json
from onelayer.compiler.storage.gguf_directory import gguf_directory, is_gguf
from onelayer.compiler.storage.gguf_format import SUFFIX, read_gguf_header
from onelayer.compiler.storage.pipeline_directory import denoiser_directory, is_pipeline, read_pipeline_index
from onelayer.compiler.storage.safetensors_format import TORCH_NAMES, TensorInfo, read_header
from onelayer.compiler.storage.stamps import FileStamps

if TYPE_CHECKING:
    import numpy as np
    import torch

# In order of preference: an original, then an emulator (named so that nothing mistakes it for an original).
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "emulator.safetensors")
INDEX_FILES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "emulator.safetensors.index.json",
)
# Shards that are open at a time.
OPEN_FILES = 64
FLOAT_NAMES = ("F64", "F32", "F16", "BF16")
PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "model.pt",
    "consolidated.00.pth",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory's tensors by checkpoint name; nothing is held but the headers.

    Tensors of a GGUF file are read as their bytes.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[Path, dict[str, str]]
    index_file: Path | None
    # Of all that is read of the model, from before the first header was read.
    stamps: FileStamps = field(repr=False, compare=False)
    _counts: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Check every header below `directory`. Raises `InputError` naming the file and the remedy."""
        directory = Path(directory)
        check_directory(directory, "give a model directory with config.json")
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: has no config.json; give a transformers model directory")
        stamps = FileStamps([directory / "config.json", *companions(directory)])
        stamps.add(directory / name for name in INDEX_FILES)
        index_file, placed = _find_files(directory)
        files = tuple(sorted(set(placed.values()))) if placed else (_single_file(directory),)
        stamps.add(files)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[Path, dict[str, str]] = {}
        for file in files:
            table, metadata[file] = read_gguf_header(file) if file.suffix == SUFFIX else read_header(file)
            for name, info in table.items():
                if placed and placed.get(name) != file:
                    continue  # a tensor that the index places elsewhere, or not at all, is not part of the model
                tensors[name] = info
        for name, file in placed.items():
            if name not in tensors:
                raise InputError(f"{file}: tensor {name!r} is missing, {index_file} places it there; restore the file")
        return cls(directory, files, tensors, metadata, index_file, stamps)

    @cached_property
    def _handle(self) -> Callable[[Path], Any]:
        """Open a shard, or return it as it was opened: a process may hold 1,024 files, a model have 1,800 shards."""
        from safetensors import safe_open

        # Positional reads, not a file mapping: mapped pages count as ours on some systems and fail on others.
        return lru_cache(OPEN_FILES)(lambda file: safe_open(file, framework="pt", backend="pread"))

    @property
    def bytes_read(self) -> int:
        """Bytes of weight read through this object so far."""
        return self._counts["bytes"]

    @property
    def is_gguf(self) -> bool:
        """Whether the weights lie in a GGUF file, with names and types of its own."""
        return self.files[0].suffix == SUFFIX

    @property
    def quantization(self) -> str | None:
        """The method by which weights are quantized; None for plain weights."""
        return None

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is unpacked as it is read."""
        return False

    @property
    def unpacking_bytes(self) -> int:
        """Bytes that reading one tensor takes in addition to the tensor."""
        return 0

    def reads_rows(self, name: str) -> bool:
        """Whether rows of a tensor can be read without the rest of it."""
        return True

    def check_unchanged(self) -> None:
        """Raise `InputError` if any file changed since it was opened; call it before what was read is published."""
        self.stamps.check()

    def _count(self, size_bytes: int) -> None:
        with self._lock:  # several threads read
            self._counts["bytes"] += size_bytes

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor, in its own dtype, to the host."""
        info = self.tensors[name]
        if info.shape and (self.is_gguf or info.dtype in TORCH_NAMES.values()):
            # The library holds the interpreter's lock as it reads, and whatever computes next to it would wait.
            return self.read_rows(name, 0, info.shape[0])
        self._count(info.size_bytes)
        tensor: torch.Tensor = self._handle(info.file).get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Read rows `start:stop` of one tensor, in its own dtype, to the host."""
        import torch

        info = self.tensors[name]
        stop = min(stop, info.shape[0])
        row_bytes = info.size_bytes // max(1, info.shape[0])
        self._count(row_bytes * (stop - start))
        dtypes = {stored: getattr(torch, dtype) for dtype, stored in TORCH_NAMES.items()}
        if info.dtype not in dtypes and not self.is_gguf:
            rows: torch.Tensor = self._handle(info.file).get_slice(name)[start:stop]
            return rows
        # The library reads the whole tensor for any part of it.
        buffer = torch.empty(row_bytes * (stop - start), dtype=torch.uint8)
        missing = buffer.numpy().data
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start + row_bytes * start)
            while missing:
                if not (count := file.readinto(missing)):
                    raise InputError(f"{info.file}: ends within tensor {name!r}; download the file again")
                missing = missing[count:]
        if self.is_gguf:
            return buffer.reshape(stop - start, row_bytes)
        return buffer.view(dtypes[info.dtype]).reshape(stop - start, *info.shape[1:])

    def gather_rows(self, name: str, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> "torch.Tensor":
        """Read the given rows of a matrix (n, width), in its own dtype, to the host; nothing else is read."""
        import numpy as np
        import torch

        info = self.tensors[name]
        row_bytes = info.size_bytes // info.shape[0]
        table = np.memmap(info.file, np.uint8, mode="r", offset=info.start, shape=(info.shape[0], row_bytes))
        self._count(row_bytes * len(rows))
        if self.is_gguf:
            return torch.from_numpy(table[rows])
        dtype = self.read_rows(name, 0, 0).dtype
        return torch.from_numpy(table[rows]).view(dtype).reshape(len(rows), *info.shape[1:])


def floating_bytes(checkpoint: Checkpoint) -> Counter[str]:
    """Count the stored bytes of each floating dtype, by its safetensors name."""
    stored: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT_NAMES:
            stored[info.dtype] += info.size_bytes
    return stored


def _find_files(directory: Path) -> tuple[Path | None, dict[str, Path]]:
    """Find the index of a sharded checkpoint and the file of each tensor; nothing for a single file."""
    if any((directory / name).is_file() for name in SINGLE_FILES):
        return None, {}
    for name in INDEX_FILES:
        index_file = directory / name
        if index_file.is_file():
            return index_file, dict(_index_rows(index_file))
    return None, {}


def _index_rows(index_file: Path) -> Iterator[tuple[str, Path]]:
    document = read_json(index_file)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_file}: field weight_map is missing or empty; download the file again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise InputError(f"{index_file}: {name!r} lies in {str(file_name)[:80]!r}, outside the directory; refused")
        file = index_file.parent / file_name
        if not file_name.endswith(".safetensors"):
            raise InputError(f"{index_file}: {file_name!r} is not a safetensors file; convert the model to safetensors")
        if not file.is_file():
            raise InputError(f"{file}: missing shard, {index_file.name} names it; download the file again")
        yield name, file


def _single_file(directory: Path) -> Path:
    for name in SINGLE_FILES:
        if (directory / name).is_file():
            return directory / name
    packed = sorted(directory.glob(f"*{SUFFIX}"))
    if len(packed) > 1:
        raise InputError(f"{directory}: holds {len(packed)} GGUF files, {packed[0].name!r} first; give one of them")
    if packed:
        return packed[0]
    for name in PICKLES:
        if (directory / name).exists():
            raise InputError(
                f"{directory / name}: a pickle can run code and is not read; convert the model to safetensors"
            )
    raise InputError(f"{directory}: has no model.safetensors or model.safetensors.index.json; give a model directory")


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """Return a local directory, the one that stands for a GGUF file, or the downloaded snapshot of a Hub id.

    Of a Hub id only weights, config and tokenizer are downloaded. Of a pipeline the denoiser's directory is returned.
    """
    if is_gguf(Path(model)):
        return gguf_directory(Path(model))
    directory = _local_directory(model, revision)
    return denoiser_directory(directory) if is_pipeline(directory) else directory


def resolve_pipeline(model: str | Path, revision: str | None = None) -> Path:
    """Return the local directory of a pipeline. Raises `InputError` if it is none."""
    directory = _local_directory(model, revision)
    read_pipeline_index(directory)
    return directory


def _local_directory(model: str | Path, revision: str | None) -> Path:
    path = Path(model)
    if path.is_file() and path.suffix == ".safetensors":
        raise InputError(
            f"{path}: is a single-file checkpoint; give a directory (diffusers: from_single_file, save_pretrained)"
        )
    if path.exists():
        return path
    name = str(model)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such directory; give a model directory or a Hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: no such directory, and not available from the Hub ({reason})") from None


def model_digest(directory: str | Path) -> str:
    """Digest what a model computes: its weight files by name and content, and its config.json."""
    checkpoint = Checkpoint.open(directory)
    return sha256_json(
        {
            "files": {file.name: file_digest(file) for file in checkpoint.files},
            "config": sha256_file(checkpoint.directory / "config.json"),
        }
    )
