"""An emulator directory in, its checked facts and factor table out; headers only, torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from onelayer.compiler.checkpoint import Checkpoint, model_digest
from onelayer.compiler.errors import InputError
from onelayer.compiler.files import read_json

if TYPE_CHECKING:
    import torch

UP, DOWN = ".lr_up", ".lr_down"


class EmulatorFacts(BaseModel):
    """The `quantization_config` of an emulator: the rank of every compressed module, and the original it stands for."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["onelayer"]
    format_version: Literal[1]
    ranks: dict[str, int]
    base_model: str
    base_revision: str | None = None
    base_digest: str


@dataclass(frozen=True)
class Emulator:
    """An emulator on disk. `facts` say what it stands for, `checkpoint` holds its factors and dense tensors."""

    directory: Path
    facts: EmulatorFacts
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: str | Path) -> "Emulator":
        """Check config and headers against each other. Raises `InputError` where it is no emulator, or damaged."""
        directory = Path(path)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give the directory of an emulator")
        config_file = directory / "config.json"
        document = read_json(config_file)
        section = document.get("quantization_config") if isinstance(document, dict) else None
        if not isinstance(section, dict) or section.get("quant_method") != "onelayer":
            raise InputError(f"{directory}: is not an emulator (config.json, quantization_config); give a compiled one")
        try:
            facts = EmulatorFacts.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in ("quantization_config", *first["loc"]))
            raise InputError(f"{config_file}: field {field}: {first['msg']}; compile the emulator again") from None
        checkpoint = Checkpoint.open(directory)
        for module, rank in facts.ranks.items():
            up, down = checkpoint.tensors.get(module + UP), checkpoint.tensors.get(module + DOWN)
            if up is None or down is None or (up.shape[1:], down.shape[:1]) != ((rank,), (rank,)):
                raise InputError(
                    f"{directory}: module {module!r} lacks factors of rank {rank} (config.json, ranks); restore it"
                )
        return cls(directory, facts, checkpoint)

    @property
    def digest(self) -> str:
        """Digest of what the emulator computes."""
        return model_digest(self.directory)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a compressed module."""
        return self.checkpoint.tensors[module + UP].shape[0], self.checkpoint.tensors[module + DOWN].shape[1]

    def factors(self, module: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Up (out, k) and down (k, in) of a module as stored, which is what training used."""
        return self.checkpoint.read(module + UP), self.checkpoint.read(module + DOWN)
