"""The keys of a PEFT adapter's weights: every one is accounted for, and the A and B of a module are paired.

Letters: r rank, in / out features of the adapted module.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from onelayer.compiler.adapters.config import CONFIG_FILE, AdapterConfig
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.safetensors_format import TensorInfo

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
class SortedKeys:
    """Keys of the file by what they are: (module, kind) for LoRA, module for rows, parameter for dense.

    `copies` are the parameters of `dense` that belong to a copy of their module, so that what is tied to it stays.
    """

    lora: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)


def sort_keys(file: Path, tensors: dict[str, TensorInfo], config: AdapterConfig) -> SortedKeys:
    """Account for every key of the file; one that is not understood is refused by name."""
    result = SortedKeys()
    for key in tensors:
        name = key.removeprefix(KEY_PREFIX)
        kind = next((kind for kind in (LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B) if name.endswith(kind)), None)
        if name == key:
            raise InputError(f"{file}: key {key!r} does not start with {KEY_PREFIX!r}; save the adapter with PEFT")
        if kind is not None:
            result.lora[name.removesuffix(kind), kind] = key
        elif name.endswith(TOKEN_ROWS):
            result.rows[name.removesuffix(TOKEN_ROWS)] = key
        elif name.endswith((VELORA, f"{VELORA}.weight")) or _is_repeated(key, tensors):
            continue
        elif name.endswith((".lr_up", ".lr_down")):
            raise InputError(
                f"{file}: key {key!r} holds the factors of an emulator, which the original does not have; "
                "train without this module in modules_to_save"
            )
        elif _is_of_base(name, config) or _is_of_copy(name, config):
            parameter = name.replace(".base_layer.", ".")
            result.dense[parameter] = key
            if _is_of_copy(name, config) and not (config.ensure_weight_tying and _is_embedding(name)):
                result.copies.add(parameter)
        else:
            raise InputError(f"{file}: key {key!r} is not understood; train plain LoRA, or remove the key")
    return result


def _is_repeated(key: str, tensors: Container[str]) -> bool:
    """Whether a key is a bias that PEFT, with bias="all", saved again next to the copy of its module."""
    parts = key.split(".")
    return parts[-2:-1] in (["original_module"], ["modules_to_save"]) and ".".join([*parts[:-2], parts[-1]]) in tensors


def _is_of_base(name: str, config: AdapterConfig) -> bool:
    """Whether the file holds a parameter of the base model itself, which PEFT trained or saved in place."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return config.bias == "all" or (config.bias == "lora_only" and path.endswith(".base_layer"))
    return _is_embedding(name)


def _is_embedding(name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path.removesuffix(".base_layer").rpartition(".")[2] in EMBEDDING_LAYERS


def _is_of_copy(name: str, config: AdapterConfig) -> bool:
    """Whether the file holds a parameter of a copy that PEFT made of a module, as `modules_to_save` says."""
    parts = name.split(".")[:-1]
    if parts[-1:] == ["base_layer"]:
        return False
    owners = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(owner.endswith(saved) for owner in owners for saved in config.modules_to_save or [])


def lora_modules(
    file: Path, tensors: dict[str, TensorInfo], keys: SortedKeys, config: AdapterConfig
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


def row_numbers(file: Path, config: AdapterConfig, module: str, info: TensorInfo) -> list[int]:
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
