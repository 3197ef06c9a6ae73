"""Writes files for the benchmarks of correction and merge: a Llama of random weights, its emulator and an adapter."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from onelayer.compiler.adapters.keys import KEY_PREFIX, LORA_A, LORA_B
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import write_json
from onelayer.compiler.storage.safetensors_format import TensorInfo
from onelayer.compiler.storage.safetensors_writer import Entry, tensor_entry, write_index, write_safetensors

BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; by default a layer has 103 MB in bfloat16."""

    hidden: int = 2048
    inner: int = 5632
    layers: int = 21
    vocabulary: int = 1024

    def linears(self) -> dict[str, tuple[int, int]]:
        """The (out, in) of the linears of one layer, by name."""
        square, up = (self.hidden, self.hidden), (self.inner, self.hidden)
        attention = {f"self_attn.{letter}_proj": square for letter in "qkvo"}
        return {**attention, "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1]}


def write_original(directory: Path, shape: Shape) -> None:
    """Write a checkpoint in bfloat16, one file per layer."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "head_dim": 128,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128, "num_key_value_heads": shape.hidden // 128,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    norms = {"input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,)}
    shards = [
        [_random(f"model.layers.{layer}.{name}.weight", size) for name, size in {**shape.linears(), **norms}.items()]
        for layer in range(shape.layers)
    ]
    table = (shape.vocabulary, shape.hidden)
    shards[-1] += [_random("model.embed_tokens.weight", table), _random("lm_head.weight", table)]
    shards[-1] += [_random("model.norm.weight", (shape.hidden,))]
    _write(directory, "model", shards, config)


def write_emulator(directory: Path, original: Path, shape: Shape, ratio: float) -> None:
    """Write random factors of every linear of the layers, in the emulator's format."""
    config = json.loads((original / "config.json").read_text())
    shards, ranks = [], {}
    for layer in range(shape.layers):
        entries = []
        for name, (rows, columns) in shape.linears().items():
            module, rank = f"model.layers.{layer}.{name}", rank_for(ratio, rows, columns)
            assert rank is not None
            ranks[module] = rank
            entries += [_random(f"{module}.lr_up", (rows, rank)), _random(f"{module}.lr_down", (rank, columns))]
        shards.append(entries)
    base = {"base_model": str(original), "base_revision": None, "base_digest": model_digest(original)}
    kind = {"quant_method": "onelayer", "format_version": 1, "factor_dtype": "bfloat16", "ranks": ranks}
    index = {"weights_file": "emulator.safetensors.index.json"}
    _write(directory, "emulator", shards, {**config, "quantization_config": {**kind, **base, **index}})


def write_adapter(directory: Path, shape: Shape, rank: int) -> None:
    """Write a LoRA on every linear of the layers, as PEFT would save it."""
    directory.mkdir()
    entries = []
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            key = f"{KEY_PREFIX}model.layers.{layer}.{name}"
            entries.append(_random(key + LORA_A, (rank, columns), torch.float32))
            entries.append(_random(key + LORA_B, (rows, rank), torch.float32))
    write_safetensors(directory / "adapter_model.safetensors", entries)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    write_json(directory / "adapter_config.json", {**config, "target_modules": sorted(shape.linears())})


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Entry:
    generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))

    def chunks() -> Iterator[bytes | memoryview]:
        yield from tensor_entry(name, torch.randn(shape, generator=generator).mul_(0.02).to(dtype)).chunks()

    probe = tensor_entry(name, torch.empty(0, dtype=dtype))
    return Entry(name, probe.dtype, shape, chunks)


def _write(directory: Path, stem: str, shards: Sequence[Sequence[Entry]], config: dict[str, object]) -> None:
    directory.mkdir()
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, entries)
        weight_map.update(dict.fromkeys((entry.name for entry in entries), file))
    total = sum(entry.size_bytes for entries in shards for entry in entries)
    write_index(directory / f"{stem}.safetensors.index.json", weight_map, total)
    write_json(directory / "config.json", config)


def tensors_of(directories: Sequence[Path], part: str) -> list[TensorInfo]:
    """Return the tensors of some checkpoints with `part` in their name, in their order on the disk."""
    found = [info for path in directories for name, info in Checkpoint.open(path).tensors.items() if part in name]
    return sorted(found, key=lambda info: (info.file, info.start))


def read_once(tensors: Sequence[TensorInfo]) -> None:
    """Read the bytes of the tensors into one small buffer, without using them."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for file in dict.fromkeys(info.file for info in tensors):
        with open(file, "rb", buffering=0) as stream:
            for info in (info for info in tensors if info.file == file):
                stream.seek(info.start)
                remaining = info.size_bytes
                while remaining:
                    remaining -= stream.readinto(buffer[: min(remaining, BUFFER_BYTES)])


def forget(directories: Sequence[Path]) -> None:
    """Ask the system to drop the files below some directories from its cache, so that they are read from the disk."""
    for file in (file for path in directories for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measured(work: Callable[[], object]) -> float:
    """Measure the seconds of `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    """Format the median and the range of some figures."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
