"""A PEFT adapter directory in, a checked table of what it changes out: read from its files, without any model.

Letters: r rank, in / out features of an adapted module.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from onelayer.compiler.adapters.keys import LoraModule, lora_modules, row_numbers, sort_keys
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_file, sha256_json
from onelayer.compiler.storage.files import check_directory, read_json
from onelayer.compiler.storage.safetensors_format import TensorInfo, read_header
from onelayer.compiler.storage.stamps import FileStamps

if TYPE_CHECKING:
    import torch


WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PROVENANCE_FILE = "onelayer.json"


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: adapted modules by their name in the model, and whatever else it replaces.

    `dense`: parameters replaced whole (modules_to_save, biases, saved embeddings), parameter name to key in the file.
    `copies`: the parameters of `dense` that are a copy of their module's; what the model ties to it stays.
    `token_rows`: single rows replaced in an embedding or head, module name to (key, row numbers).
    `stamps` are those of its files from before they were read.
    """

    directory: Path
    config: AdapterConfig
    tensors: dict[str, TensorInfo]
    modules: dict[str, LoraModule]
    dense: dict[str, str] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    token_rows: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    stamps: FileStamps = field(default_factory=FileStamps, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> "Adapter":
        """Read the configuration and the header. Raises `InputError` on any variant, damage or key not understood."""
        directory = Path(path)
        check_directory(directory, "give the directory of a PEFT LoRA adapter")
        stamps = adapter_stamps(directory)
        config = read_config(directory)
        file = _weights_file(directory)
        tensors, _ = read_header(file)
        sorted_keys = sort_keys(file, tensors, config)
        modules = {module.name: module for module in lora_modules(file, tensors, sorted_keys, config)}
        rows = {name: (key, row_numbers(file, config, name, tensors[key])) for name, key in sorted_keys.rows.items()}
        if not (modules or rows or sorted_keys.dense):
            raise InputError(f"{file}: holds no adapter weights; train the adapter, or give another directory")
        copies, provenance = frozenset(sorted_keys.copies), read_provenance(directory)
        return cls(directory, config, tensors, modules, sorted_keys.dense, copies, rows, provenance, stamps)

    def read(self, key: str) -> "torch.Tensor":
        """Read one tensor of the file, in its stored dtype, to the host."""
        from safetensors import safe_open

        with safe_open(self.tensors[key].file, framework="pt", backend="pread") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> "torch.Tensor":
        """Read rows `start:stop` of one tensor of the file, in its stored dtype, to the host."""
        from safetensors import safe_open

        with safe_open(self.tensors[key].file, framework="pt", backend="pread") as file:
            rows: torch.Tensor = file.get_slice(key)[start:stop]
        return rows

    def factors(self, name: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read A (r, in) and B (out, r) of a module in float32, to the host; refuse values that are not finite."""
        module = self.modules[name]
        a, b = self.read(module.key_a).float(), self.read(module.key_b).float()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InputError(f"{self.directory}: {name}: holds values that are not finite; train the adapter again")
        return a, b

    def recorded_digest(self, part: str) -> str | None:
        """Return the recorded digest of `base` or `trained_on`; None if there is no record of it."""
        entry = (self.provenance or {}).get(part) or {}
        digest = entry.get("digest") if isinstance(entry, dict) else entry
        if not isinstance(digest, str | None):
            raise InputError(
                f"{self.directory / PROVENANCE_FILE}: field {part}.digest is not a digest; restore the file"
            )
        return digest


def adapter_stamps(directory: Path) -> FileStamps:
    """Take the stamps of an adapter's files, before they are read."""
    return FileStamps(directory / name for name in (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE))


def adapter_digest(path: str | Path) -> str:
    """Digest what an adapter computes: its configuration and its weights by content."""
    directory = Path(path)
    files = (directory / CONFIG_FILE, _weights_file(directory))
    return sha256_json({file.name: sha256_file(file) for file in files})


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """Read what this tool recorded about an adapter (`onelayer.json`), or None for an adapter made elsewhere."""
    path = directory / PROVENANCE_FILE
    if not path.is_file():
        return None
    document = read_json(path)
    if not isinstance(document, dict) or document.get("kind") != "adapter":
        raise InputError(f"{path}: field kind is not 'adapter'; restore the file, or remove it")
    return document


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_FILE
    if file.is_file():
        return file
    if (directory / PICKLE_FILE).exists():
        raise InputError(f"{directory / PICKLE_FILE}: a pickle can run code and is not read; save it as safetensors")
    raise InputError(f"{file}: no such file; give the directory of a PEFT LoRA adapter")
