"""An emulator directory in, its checked facts and factor table out. Reads headers only; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.compiler.documents import checked_document
from onelayer.compiler.emulators.facts import (
    CODEBOOK,
    CODES,
    DENSE,
    DOWN,
    UP,
    EmulatorFacts,
    stack_sizes,
    stack_tensor,
)
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import kept_values
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import check_directory
from onelayer.compiler.storage.model_config import CONFIG_FILE, read_model_config
from onelayer.compiler.storage.stamps import FileStamps

if TYPE_CHECKING:
    import torch

    from onelayer.compiler.codes.encode import Coded


@dataclass(frozen=True)
class Emulator:
    """An emulator on disk. `facts` describe it and its original, `checkpoint` holds its factors and dense tensors."""

    directory: Path
    facts: EmulatorFacts
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: str | Path) -> "Emulator":
        """Check config and headers against each other. Raises `InputError` if it is not an emulator, or is damaged."""
        directory = Path(path)
        check_directory(directory, "give the directory of an emulator")
        config_file = directory / CONFIG_FILE
        stamps = FileStamps([config_file])
        section = read_model_config(directory).get("quantization_config")
        if section is None or section.get("quant_method") != "onelayer":
            raise InputError(f"{directory}: is not an emulator (config.json, quantization_config); give a compiled one")
        remedy = "compile the emulator again"
        facts = checked_document(EmulatorFacts, section, config_file, remedy, section="quantization_config")
        checkpoint = Checkpoint.open(directory)
        stamps.check()
        _check_weights_file(config_file, facts, checkpoint)
        _check_tensors(directory, facts, checkpoint)
        return cls(directory, facts, checkpoint)

    @property
    def digest(self) -> str:
        """The digest of what the emulator computes."""
        return model_digest(self.directory)

    def check_original(self, directory: Path) -> None:
        """Raise `InputError` if the emulator was not compiled from the model in `directory`."""
        if (digest := model_digest(directory)) != self.facts.base_digest:
            raise InputError(
                f"{self.directory}: is an emulator of {self.facts.base_model} ({self.facts.base_digest[:12]}), "
                f"not of {directory} ({digest[:12]}); give the original it was compiled from"
            )

    def shape(self, module: str) -> tuple[int, int]:
        """Return (out, in) of a compressed module."""
        if self.facts.quantized_dtype is not None:
            return self.facts.shapes[module]
        return self.checkpoint.tensors[module + UP].shape[0], self.checkpoint.tensors[module + DOWN].shape[1]

    def kept_values(self, module: str) -> int:
        """Count the values of a module's factors, or of its whole weight if it has no factors or is coded."""
        rank = None if module in self.facts.codes else self.facts.ranks.get(module)
        return kept_values(*self.shape(module), rank)

    def factors(self, module: str) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Read up (out, k) and down (k, in) of a module as training used them, or its weight (out, in) and None.

        The weight of a coded module has at least the precision of float32: training used codes and residual one after
        the other, not their sum in the model's dtype.
        """
        read = self.checkpoint.read
        if self.facts.quantized_dtype is None:
            return read(module + UP), read(module + DOWN)
        if module in self.facts.codes:
            return self._decoded(*self.coded(module), self.facts.shapes[module]), None
        held = {ending: read(module + ending) for ending in self.facts.linear_sizes(module)}
        return self._dequantized(held, self.facts.shapes[module])

    def coded(self, module: str) -> "tuple[Coded, tuple[torch.Tensor, torch.Tensor] | None]":
        """Read the codes of a coded module, and its residual factors up (out, k) and down (k, in) if it has any."""
        return self._coded(
            {ending: self.checkpoint.read(module + ending) for ending in self.facts.linear_sizes(module)},
            self.facts.shapes[module],
            self.facts.code_bits,
        )

    def _coded(
        self, held: "Mapping[str, torch.Tensor]", shape: tuple[int, int], bits: int
    ) -> "tuple[Coded, tuple[torch.Tensor, torch.Tensor] | None]":
        from onelayer.compiler.codes.encode import unpacked

        codes = unpacked(held[CODES], held[CODEBOOK], shape[1], bits)
        if UP not in held:
            return codes, None
        up, down = self._dequantized(held, shape)
        assert down is not None
        return codes, (up, down)

    def _decoded(
        self, codes: "Coded", residual: "tuple[torch.Tensor, torch.Tensor] | None", shape: tuple[int, int]
    ) -> "torch.Tensor":
        """Compute the weight (out, in) that codes stand for, residual factors included, in float32 or wider."""
        import torch

        from onelayer.compiler.codes.encode import decode

        dtype = getattr(torch, str(self.facts.unpacked_dtype))
        weight = decode(codes, shape[1], dtype).to(torch.promote_types(dtype, torch.float32))
        return weight if residual is None else weight.addmm_(residual[0].to(weight), residual[1].to(weight))

    def stack(self, name: str) -> "dict[str, torch.Tensor]":
        """Read the tensors (E, ...) that replace a stack of experts, as stored, by the ending of their names."""
        endings = stack_sizes(self.facts.stacks[name], self.facts.quantized_dtype)
        return {ending: self.checkpoint.read(stack_tensor(name, ending)) for ending in endings}

    def expert_factors(
        self, name: str, held: "Mapping[str, torch.Tensor]", expert: int
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Like `factors`, for one expert of a stack that `stack` has read."""
        own = {ending: tensor[expert] for ending, tensor in held.items()}
        if self.facts.quantized_dtype is None:
            return own[UP], own[DOWN]
        facts = self.facts.stacks[name]
        shape = facts.shape[1:]
        if CODES in own:
            return self._decoded(*self._coded(own, shape, facts.code_bits), shape), None
        return self._dequantized(own, shape)

    def coded_expert(
        self, name: str, held: "Mapping[str, torch.Tensor]", expert: int
    ) -> "tuple[Coded, tuple[torch.Tensor, torch.Tensor] | None]":
        """Like `coded`, for one expert of a coded stack that `stack` has read."""
        facts, own = self.facts.stacks[name], {ending: tensor[expert] for ending, tensor in held.items()}
        return self._coded(own, facts.shape[1:], facts.code_bits)

    def _dequantized(
        self, held: "Mapping[str, torch.Tensor]", shape: tuple[int, int]
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        import torch

        from onelayer.compiler.factors.quantize import dequantize_matrix

        factor_dtype, dtype = self.facts.quantized_dtype, getattr(torch, str(self.facts.unpacked_dtype))
        assert factor_dtype is not None
        if DENSE in held:
            return dequantize_matrix(held[DENSE], shape[1], factor_dtype, dtype), None
        return dequantize_matrix(held[UP], shape[0], factor_dtype, dtype).T, dequantize_matrix(
            held[DOWN], shape[1], factor_dtype, dtype
        )

    @property
    def stack_tensors(self) -> dict[str, tuple[str, str]]:
        """The stack and the ending of every tensor that replaces a stack."""
        return {
            stack_tensor(stack, ending): (stack, ending)
            for stack, facts in self.facts.stacks.items()
            for ending in stack_sizes(facts, self.facts.quantized_dtype)
        }


def _check_weights_file(config_file: Path, facts: EmulatorFacts, checkpoint: Checkpoint) -> None:
    """Refuse a pointer to other weights than those that the digest is of; transformers would load them instead."""
    file = checkpoint.index_file or checkpoint.files[0]
    if facts.weights_file is not None and facts.weights_file != file.name:
        raise InputError(
            f"{config_file}: field quantization_config.weights_file names {facts.weights_file}, but the directory's "
            f"weights are {file.name}; compile the emulator again"
        )


def _check_tensors(directory: Path, facts: EmulatorFacts, checkpoint: Checkpoint) -> None:
    """Refuse files that do not match the configuration."""
    factor_dtype = facts.quantized_dtype
    for module in facts.compressed:
        rank = facts.ranks.get(module)
        wanted = facts.linear_sizes(module)
        for ending, sizes in wanted.items():
            tensor = checkpoint.tensors.get(module + ending)
            shape = () if tensor is None else tensor.shape
            if len(shape) != 2 or any(size not in (None, real) for size, real in zip(sizes, shape, strict=True)):
                what = (
                    f"factors of rank {rank} (config.json, ranks)" if ending in (UP, DOWN) else "its quantized weight"
                )
                raise InputError(f"{directory}: module {module!r} lacks {what}; restore it")
    for stack, stack_facts in facts.stacks.items():
        for ending, stack_shape in stack_sizes(stack_facts, factor_dtype).items():
            tensor = checkpoint.tensors.get(stack_tensor(stack, ending))
            if tensor is None or tensor.shape != stack_shape:
                raise InputError(f"{directory}: stack {stack!r} lacks {stack_tensor(stack, ending)!r}; restore it")
