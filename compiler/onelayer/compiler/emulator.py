"""The emulator as a directory: unit shards written as they finish, then index, config and figures, metadata last.

Goes in: resident units and their factors. Comes out: an ordinary transformers directory (see `emulator_reader.py` for
the way back). Held: one unit at a time; matrices that stay on disk are copied in slices.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.checkpoint import model_digest
from onelayer.compiler.companions import copy_companions
from onelayer.compiler.emulator_reader import DOWN, UP
from onelayer.compiler.factorize import Factors
from onelayer.compiler.files import write_json, write_text
from onelayer.compiler.lazy import DiskMatrix
from onelayer.compiler.measure import Result
from onelayer.compiler.shim import SHIM_FILE, SHIM_TEXT, auto_map
from onelayer.compiler.units import StreamedModel, Unit
from onelayer.compiler.writer import TORCH_NAMES, Entry, tensor_entry, write_index, write_safetensors

FORMAT_VERSION = 1
INDEX_FILE = "emulator.safetensors.index.json"
CARD = """---
base_model: {model}
tags:
- onelayer
---

# Emulator of {model}

A compact low-rank stand-in, made to train LoRA on and for nothing else. Load it with transformers after
`import onelayer.runtime`, or with `trust_remote_code=True` where onelayer is installed. Train with `onelayer train` or
any trainer that takes a PEFT adapter, then make the adapter fit the original with `onelayer correct`.
`emulator.json` says how it was made and how far each linear is from the original.
"""


class LinearFigures(Result):
    """What became of one linear. `singular_values`: its output's, the kept ones; `output_energy`: all their squares.

    A prefix of rank j has the relative error sqrt(1 - sum_{i<=j} s_i^2 / output_energy), so a slice needs no data.
    """

    name: str
    rank: int
    error: float
    optimal_error: float
    singular_values: list[float]
    output_energy: float
    fallback: str | None

    @classmethod
    def of(cls, name: str, factors: Factors) -> "LinearFigures":
        """The figures of some factors, to six digits."""
        rank = factors.up.shape[1]
        return cls(
            name=name,
            rank=rank,
            error=_digits(factors.error),
            optimal_error=_digits(factors.optimal_error),
            singular_values=[_digits(value) for value in factors.singular_values[:rank].tolist()],
            output_energy=_digits(float(factors.singular_values.square().sum())),
            fallback=factors.fallback,
        )


class EmulatorWriter:
    """Writes one emulator into `directory`, a shard for each unit."""

    def __init__(self, directory: Path, streamed: StreamedModel) -> None:
        self.directory = directory
        self.streamed = streamed
        self.linears: dict[str, LinearFigures] = {}
        self._written: dict[int, dict[str, int]] = {}
        self._shards = len(streamed.units) + bool(streamed.outside)

    def write_unit(self, unit: Unit, factors: Mapping[str, Factors]) -> None:
        """One shard from a unit that is resident: factors in place of the weights of the linears they belong to."""
        tensors = self.streamed.held(unit)
        entries = []
        for name, found in factors.items():
            del tensors[f"{name}.weight"]
            entries += [tensor_entry(name + UP, found.up.cpu()), tensor_entry(name + DOWN, found.down.cpu())]
        entries += [_entry(name, tensor) for name, tensor in tensors.items() if name not in self.streamed.aliases]
        self._write_shard(unit.position, entries)
        self.linears.update({name: LinearFigures.of(name, found) for name, found in factors.items()})

    def write_rest(self) -> None:
        """The units that no batch visited or that hold nothing to factorise, dense, and what lies outside all units."""
        for unit in self.streamed.units:
            if unit.position not in self._written:
                with self.streamed.resident(unit, torch.device("cpu")):
                    self.write_unit(unit, {})
        if self.streamed.outside:
            names = [name for name in self.streamed.outside if name not in self.streamed.aliases]
            matrices = {
                name: self.streamed.matrix(name, torch.device("cpu")) for name in names if name in self.streamed.lazy
            }
            with self.streamed.loaded([name for name in names if name not in matrices]) as small:
                entries = [_entry(name, tensor) for name, tensor in {**matrices, **small}.items()]
            self._write_shard(len(self.streamed.units), entries)

    def finish(self, base: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
        """Index, config, companions and `emulator.json`; returns the emulator's digest."""
        written = {name: size for shard in self._written.values() for name, size in shard.items()}
        shard_of = {name: self._shard_name(position) for position, names in self._written.items() for name in names}
        write_index(self.directory / INDEX_FILE, shard_of, sum(written.values()))
        copy_companions(self.streamed.checkpoint.directory, self.directory)
        write_text(self.directory / SHIM_FILE, SHIM_TEXT)
        write_json(self.directory / "config.json", self._config(base))
        digest = model_digest(self.directory)
        linears = [found.model_dump(mode="json") for found in self.linears.values()]
        head = {"format_version": FORMAT_VERSION, "kind": "emulator", "digest": digest, "base": dict(base)}
        write_text(self.directory / "README.md", CARD.format(model=base["model"]))
        write_json(self.directory / "emulator.json", {**head, **figures, "linears": linears})
        return digest

    def _config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        source = self.streamed.checkpoint.directory / "config.json"
        document: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        dtype = str(self.streamed.dtype).removeprefix("torch.")
        document["dtype"] = dtype
        document["auto_map"] = auto_map(self.streamed.config)
        document["quantization_config"] = {
            "quant_method": "onelayer",
            "format_version": FORMAT_VERSION,
            "ranks": {name: found.rank for name, found in self.linears.items()},
            "factor_dtype": dtype,
            "base_model": base["model"],
            "base_revision": base["revision"],
            "base_digest": base["digest"],
            "weights_file": INDEX_FILE,
        }
        return document

    def _write_shard(self, position: int, entries: list[Entry]) -> None:
        self._written[position] = {entry.name: entry.size_bytes for entry in entries}
        if entries:
            write_safetensors(self.directory / self._shard_name(position), entries, {"format": "pt"})

    def _shard_name(self, position: int) -> str:
        return f"emulator-{position + 1:05d}-of-{self._shards:05d}.safetensors"


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    if not isinstance(tensor, DiskMatrix):
        return tensor_entry(name, tensor.cpu())
    dtype = TORCH_NAMES[str(tensor.dtype).removeprefix("torch.")]

    def chunks() -> Iterator[bytes | memoryview]:
        for start, stop in tensor.row_slices():
            yield from tensor_entry(name, tensor.read(start, stop)).chunks()

    return Entry(name, dtype, tuple(tensor.shape), chunks)
