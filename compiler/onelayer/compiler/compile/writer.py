"""Writes the emulator as a directory: unit shards as they finish, then index, config and figures, metadata last.

In: resident units and the factors of their linears. Out: an ordinary transformers directory (`emulators/reader.py`
reads it). Held: one unit at a time; matrices that stay on disk are copied in slices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onelayer.compiler.compile.resume import UnitRecord, WorkDirectory
from onelayer.compiler.dequantize.formats import without_quantization
from onelayer.compiler.emulators.directory import (
    CODES_VERSION,
    DIFFUSERS_INDEX,
    DIFFUSERS_WEIGHTS,
    FORMAT_VERSION,
    INDEX_FILE,
    SHIM_FILE,
    SHIM_TEXT,
    STACKS_VERSION,
    auto_map,
    card,
)
from onelayer.compiler.emulators.facts import stack_tensor
from onelayer.compiler.emulators.figures import LinearFigures, StackFigures
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.transfers import on_host
from onelayer.compiler.models.lazy_tensors import DiskMatrix
from onelayer.compiler.models.linears import weight_shape
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.companions import copy_companions
from onelayer.compiler.storage.files import write_json, write_text
from onelayer.compiler.storage.model_config import read_model_config, write_model_config
from onelayer.compiler.storage.safetensors_format import TORCH_NAMES
from onelayer.compiler.storage.safetensors_writer import Entry, tensor_entry, write_index, write_safetensors


@dataclass(frozen=True)
class StoredLinear:
    """The replacement of one linear's weight: tensors by the ending of their names, and the figures."""

    figures: LinearFigures
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StoredStack:
    """The replacement of a stack of experts: tensors (E, ...) by the ending of their names, and the figures."""

    figures: StackFigures
    tensors: Mapping[str, torch.Tensor]


class EmulatorWriter:
    """Writes one emulator into a work directory, a shard and a record for each unit; continues what is there."""

    def __init__(self, work: WorkDirectory, streamed: StreamedModel, factor_dtype: FactorDtype | None) -> None:
        self.work = work
        self.factor_dtype = factor_dtype
        self.directory = work.payload
        self.streamed = streamed
        self._shards = len(streamed.units) + bool(streamed.parameters_outside_units)

    @property
    def records(self) -> list[UnitRecord]:
        """The records of the written units, in module order."""
        return [self.work.finished[position] for position in sorted(self.work.finished)]

    @property
    def linears(self) -> dict[str, LinearFigures]:
        """Figures of every linear that is compressed, by name."""
        return {row["name"]: LinearFigures(**row) for record in self.records for row in record.linears}

    @property
    def stacks(self) -> dict[str, StackFigures]:
        """Figures of every stack of experts that is compressed, by name."""
        return {row["name"]: StackFigures(**row) for record in self.records for row in record.stacks}

    def has(self, unit: Unit) -> bool:
        """Whether a unit is written."""
        return unit.position in self.work.finished

    def write_unit(
        self,
        unit: Unit,
        linears: Mapping[str, StoredLinear],
        stacks: Mapping[str, StoredStack],
        dense: Mapping[str, str],
    ) -> None:
        """Write the shard of a resident unit, with `linears` and `stacks` instead of the weights that they replace.

        `dense` gives the reason for each weight that was to be compressed and was not.
        """
        tensors = self.streamed.tensors_of(unit)
        entries = []
        for name, stored in linears.items():
            del tensors[f"{name}.weight"]
            entries += [tensor_entry(name + ending, tensor) for ending, tensor in stored.tensors.items()]
        for name, stack in stacks.items():
            del tensors[name]
            entries += [tensor_entry(stack_tensor(name, ending), item) for ending, item in stack.tensors.items()]
        kept = {name: tensor for name, tensor in tensors.items() if name not in self.streamed.weights.aliases}
        plain = {name: tensor.detach() for name, tensor in kept.items() if not isinstance(tensor, DiskMatrix)}
        entries += [_entry(name, tensor) for name, tensor in {**kept, **on_host(plain)}.items()]
        self._write_shard(
            unit.position,
            entries,
            linears=[_row(stored) for stored in linears.values()],
            stacks=[_row(stored) for stored in stacks.values()],
            dense=dict(dense),
        )

    def write_rest(self) -> None:
        """Write units without a shard (not visited, or nothing to factorize) and parameters outside units, dense."""
        for unit in self.streamed.units:
            if not self.has(unit):
                with self.streamed.resident(unit, torch.device("cpu")):
                    self.write_unit(unit, {}, {}, {})
        last = len(self.streamed.units)
        if self.streamed.parameters_outside_units and last not in self.work.finished:
            names = [
                name for name in self.streamed.parameters_outside_units if name not in self.streamed.weights.aliases
            ]
            lazy = [name for name in names if name in self.streamed.lazy]
            matrices = {name: self.streamed.matrix(name, torch.device("cpu")) for name in lazy}
            small = self.streamed.weights.load(name for name in names if name not in matrices)
            entries = [_entry(name, tensor) for name, tensor in {**matrices, **small}.items()]
            self._write_shard(last, entries, linears=[], stacks=[], dense={})

    def finish(self, base: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
        """Write index, config, companion files and `emulator.json`; return the emulator's digest."""
        shard_of = {name: record.shard for record in self.records for name in record.tensor_bytes}
        total_bytes = sum(size for record in self.records for size in record.tensor_bytes.values())
        denoises = self.streamed.library.DENOISES
        write_index(self.directory / (DIFFUSERS_INDEX if denoises else INDEX_FILE), shard_of, total_bytes)
        copy_companions(self.streamed.checkpoint.directory, self.directory)
        if not denoises:
            write_text(self.directory / SHIM_FILE, SHIM_TEXT)
        write_model_config(self.directory, self._config(base))
        digest = model_digest(self.directory)
        linears = [item.model_dump(mode="json") for item in self.linears.values()]
        stacks = [item.model_dump(mode="json") for item in self.stacks.values()]
        head = {"format_version": self._version, "kind": "emulator", "digest": digest, "base": dict(base)}
        write_text(self.directory / "README.md", card(base["model"], refined=False))
        self.streamed.checkpoint.check_unchanged()
        write_json(self.directory / "emulator.json", {**head, **figures, "linears": linears, "stacks": stacks})
        return digest

    @property
    def _version(self) -> int:
        if any(figures.form == "coded" for figures in (*self.stacks.values(), *self.linears.values())):
            return CODES_VERSION
        return STACKS_VERSION if self.stacks else FORMAT_VERSION

    def _config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        document = without_quantization(read_model_config(self.streamed.checkpoint.directory))
        dtype = str(self.streamed.dtype).removeprefix("torch.")
        loading = {"stored_dtype": dtype}
        if not self.streamed.library.DENOISES:  # classes of diffusers warn of fields that they do not know
            document |= {"dtype": dtype, "auto_map": auto_map(self.streamed.config)}
            loading = {"weights_file": INDEX_FILE}
        linears = self.linears
        packed = {
            "unpacked_dtype": dtype,
            "shapes": {name: weight_shape(self.streamed.model.get_submodule(name)) for name in linears},
            "quantized_dense": [name for name, figures in linears.items() if figures.form == "dense"],
        }
        stacks = {
            name: {
                "shape": figures.shape,
                "rank": figures.rank if figures.form != "dense" else None,
                **(
                    {field: getattr(figures, field) for field in ("code_width", "code_bits")}
                    if figures.form == "coded"
                    else {}
                ),
            }
            for name, figures in self.stacks.items()
        }
        codes = {name: figures.code_width for name, figures in linears.items() if figures.form == "coded"}
        bits = next((linears[name].code_bits for name in codes), None)  # the same for all
        document["quantization_config"] = {
            "quant_method": "onelayer",
            "format_version": self._version,
            "ranks": {
                name: figures.rank for name, figures in linears.items() if figures.form != "dense" and figures.rank
            },
            "factor_dtype": self.factor_dtype or dtype,
            **(packed if self.factor_dtype is not None else {}),
            **({"codes": codes, "code_bits": bits} if codes else {}),
            **({"stacks": stacks} if stacks else {}),
            "base_model": base["model"],
            "base_revision": base["revision"],
            "base_digest": base["digest"],
            **loading,
        }
        return document

    def _write_shard(self, position: int, entries: list[Entry], **figures: Any) -> None:
        kind = DIFFUSERS_WEIGHTS if self.streamed.library.DENOISES else "emulator"
        shard = f"{kind}-{position + 1:05d}-of-{self._shards:05d}.safetensors" if entries else ""
        digest = write_safetensors(self.directory / shard, entries, {"format": "pt"}) if entries else None
        self.streamed.checkpoint.check_unchanged()
        sizes = {entry.name: entry.size_bytes for entry in entries}
        self.work.finish_unit(UnitRecord(position=position, shard=shard, sha256=digest, tensor_bytes=sizes, **figures))


def _row(stored: StoredLinear | StoredStack) -> dict[str, Any]:
    return stored.figures.model_dump(mode="json")


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    if not isinstance(tensor, DiskMatrix):
        return tensor_entry(name, tensor)
    dtype = TORCH_NAMES[str(tensor.dtype).removeprefix("torch.")]

    def chunks() -> Iterator[bytes | memoryview]:
        for start, stop in tensor.row_slices():
            yield from tensor_entry(name, tensor.read(start, stop)).chunks()

    return Entry(name, dtype, tuple(tensor.shape), chunks)
