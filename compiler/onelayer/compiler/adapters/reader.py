"""A PEFT adapter directory in, a checked table of what it changes out: read from its files, without any model.

Letters: r rank, in / out features of the adapted module.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_file, sha256_json
from onelayer.compiler.storage.files import read_json
from onelayer.compiler.storage.safetensors_format import TensorInfo, read_header

if TYPE_CHECKING:
    import torch


WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PROVENANCE_FILE = "onelayer.json"
KEY_PREFIX = "base_model.model."

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
# A fixed projection that compresses VeLoRA's saved activations in training; the trained A and B stand without it.
VELORA = ".lora_velora_embed"
# PEFT's names for the matrices that it saves whole when it finds them resized or targeted (its EMBEDDING_LAYER_NAMES).
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: the weight becomes W + scaling * B A, or its transpose if W is (in, out)."""

    name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    key_a: str
    key_b: str
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: adapted modules by their name in the model, and whatever else it replaces.

    `dense`: parameters replaced whole (modules_to_save, biases, saved embeddings), parameter name to key in the file.
    `token_rows`: single rows replaced in an embedding or head, module name to (key, row numbers).
    """

    directory: Path
    config: AdapterConfig
    tensors: dict[str, TensorInfo]
    modules: dict[str, LoraModule]
    dense: dict[str, str] = field(default_factory=dict)
    token_rows: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Adapter":
        """Read the configuration and the header. Raises `InputError` on any variant, damage or key not understood."""
        directory = Path(path)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give the directory of a PEFT LoRA adapter")
        config = read_config(directory)
        file = _weights_file(directory)
        tensors, _ = read_header(file)
        sorted_keys = _sort_keys(file, tensors, config)
        modules = {module.name: module for module in _modules(file, tensors, sorted_keys, config)}
        rows = {name: (key, _row_numbers(file, config, name, tensors[key])) for name, key in sorted_keys.rows.items()}
        if not (modules or rows or sorted_keys.dense):
            raise InputError(f"{file}: holds no adapter weights; train the adapter, or give another directory")
        return cls(directory, config, tensors, modules, sorted_keys.dense, rows, read_provenance(directory))

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


@dataclass(frozen=True)
class _SortedKeys:
    """Keys of the file by what they are: (module, kind) for LoRA, module for rows, parameter for dense."""

    lora: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)


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


def _sort_keys(file: Path, tensors: dict[str, TensorInfo], config: AdapterConfig) -> _SortedKeys:
    """Account for every key of the file; one that is not understood is refused by name."""
    result = _SortedKeys()
    for key in tensors:
        name = key.removeprefix(KEY_PREFIX)
        kind = next((kind for kind in (LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B) if name.endswith(kind)), None)
        if name == key:
            raise InputError(f"{file}: key {key!r} does not start with {KEY_PREFIX!r}; save the adapter with PEFT")
        if kind is not None:
            result.lora[name.removesuffix(kind), kind] = key
        elif name.endswith(TOKEN_ROWS):
            result.rows[name.removesuffix(TOKEN_ROWS)] = key
        elif name.endswith((VELORA, f"{VELORA}.weight")):
            continue
        elif name.endswith((".lr_up", ".lr_down")):
            raise InputError(
                f"{file}: key {key!r} holds the factors of an emulator, which the original does not have; "
                "train without this module in modules_to_save"
            )
        elif _explained(name, config):
            result.dense[name.replace(".base_layer.", ".")] = key
        else:
            raise InputError(f"{file}: key {key!r} is not understood; train plain LoRA, or remove the key")
    return result


def _explained(name: str, config: AdapterConfig) -> bool:
    """Whether the configuration says why a whole parameter is in the file."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and path.endswith(".base_layer"))):
        return True
    module = path.removesuffix(".base_layer")
    if leaf == "weight" and module.rpartition(".")[2] in EMBEDDING_LAYERS:
        return True
    if path.endswith(".base_layer"):
        return False
    parts = path.split(".")
    owners = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(owner.endswith(saved) for owner in owners for saved in config.modules_to_save or [])


def _modules(
    file: Path, tensors: dict[str, TensorInfo], keys: _SortedKeys, config: AdapterConfig
) -> Iterator[LoraModule]:
    """Pair the A and B of every module and check their shapes against each other and the configured rank."""
    for name, kind in keys.lora:
        if kind not in (LORA_A, EMBEDDING_A):
            if (name, LORA_A if kind == LORA_B else EMBEDDING_A) not in keys.lora:
                raise InputError(f"{file}: {name}: B has no A; save the adapter again")
            continue
        key_a, key_b = keys.lora[name, kind], keys.lora.get((name, LORA_B if kind == LORA_A else EMBEDDING_B))
        if key_b is None:
            raise InputError(f"{file}: {name}: A has no B; save the adapter again")
        shape_a, shape_b = tensors[key_a].shape, tensors[key_b].shape
        if len(shape_a) != 2 or len(shape_b) != 2:
            raise InputError(f"{file}: {name}: A {shape_a} and B {shape_b} must be matrices; adapt linears only")
        rank = shape_a[0]
        if rank != shape_b[1]:
            raise InputError(f"{file}: {name}: A {shape_a} and B {shape_b} differ in rank; save the adapter again")
        if rank != config.rank_of(name):
            raise InputError(
                f"{file}: {name}: has rank {rank}, but {CONFIG_FILE} (r, rank_pattern) says {config.rank_of(name)}; "
                "restore the file that belongs to it"
            )
        scaling = config.scaling_of(name, rank)
        yield LoraModule(name, rank, scaling, shape_a[1], shape_b[0], key_a, key_b, kind == EMBEDDING_A)


def _row_numbers(file: Path, config: AdapterConfig, module: str, info: TensorInfo) -> list[int]:
    """Return the rows that a block of trained tokens replaces, from the configuration."""
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if indices is None or len(info.shape) != 2 or info.shape[0] != len(indices):
        raise InputError(
            f"{file}: {module}: {info.shape} token rows, but {CONFIG_FILE} (trainable_token_indices) has {indices}; "
            "restore the file that belongs to it"
        )
    return indices
