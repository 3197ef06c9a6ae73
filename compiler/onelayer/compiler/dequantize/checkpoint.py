"""A quantized checkpoint as a plain one: its packed weights answer as the floats that they stand for.

In: a checkpoint and its config.json. Out: the same checkpoint, in which a packed weight is one tensor. The stored bytes
are what is read from disk and counted; a weight is unpacked as it is read, on the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onelayer.compiler.dequantize.formats import FIELD, format_of, quantization_method, quantization_settings
from onelayer.compiler.dequantize.packed import REMEDY, PackedTensor, unpacked_table
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.model_config import CONFIG_FILE
from onelayer.compiler.storage.safetensors_format import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class UnpackedCheckpoint(Checkpoint):
    """A checkpoint whose `tensors` are those of `stored`, with one for each packed weight."""

    stored: Checkpoint
    method: str

    @property
    def quantization(self) -> str | None:
        """The method by which weights are quantized."""
        return self.method

    @property
    def bytes_read(self) -> int:
        """Bytes of weight read so far, as stored."""
        return self.stored.bytes_read

    @property
    def unpacking_bytes(self) -> int:
        """Bytes that unpacking one weight takes in addition to the weight; tables are only unpacked by rows."""
        packed = (info for info in self.tensors.values() if isinstance(info, PackedTensor) and not info.by_rows)
        return max((info.unpacking_bytes for info in packed), default=0)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is unpacked as it is read."""
        return isinstance(self.tensors[name], PackedTensor)

    def reads_rows(self, name: str) -> bool:
        """Whether rows of a tensor can be read without the rest of it."""
        info = self.tensors[name]
        return not isinstance(info, PackedTensor) or info.by_rows

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor to the host, unpacked. Raises `InputError` naming a weight that cannot be unpacked."""
        info = self.tensors[name]
        if not isinstance(info, PackedTensor):
            return self.stored.read(name)
        from onelayer.compiler.dequantize.numerics import FLOATS

        tensors = {part: self.stored.read(stored.name) for part, stored in info.parts.items()}
        try:
            return info.unpacker.unpack(info, tensors, FLOATS[info.dtype])
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{info.file}: weight {name!r}: cannot be unpacked ({reason}); {REMEDY}") from None

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Read rows `start:stop` of one tensor; of a packed weight all of it is read."""
        info = self.tensors[name]
        if not isinstance(info, PackedTensor):
            return self.stored.read_rows(name, start, stop)
        if not info.by_rows:
            return self.read(name)[start:stop]
        (part,) = info.parts.values()
        return _unpacked_rows(info, part, self.stored.read_rows(part.name, start, stop))

    def gather_rows(self, name: str, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> "torch.Tensor":
        """Read the given rows of a matrix; of a packed weight all of it is read."""
        info = self.tensors[name]
        if not isinstance(info, PackedTensor):
            return self.stored.gather_rows(name, rows)
        if not info.by_rows:
            return self.read(name)[rows]
        (part,) = info.parts.values()
        return _unpacked_rows(info, part, self.stored.gather_rows(part.name, rows))


def _unpacked_rows(info: PackedTensor, part: TensorInfo, rows: "torch.Tensor") -> "torch.Tensor":
    from onelayer.compiler.dequantize.numerics import FLOATS

    return info.unpacker.unpack_rows(part, rows, FLOATS[info.dtype])


def unpacked(stored: Checkpoint, document: Mapping[str, Any], dtype: str) -> Checkpoint:
    """Return a checkpoint as a plain one, its packed weights in `dtype` (as safetensors names it).

    Raises `InputError` if the format is not supported, a weight lacks a part, or no weight is packed.
    """
    settings = quantization_settings(document)
    if settings is None:
        return stored
    config_file, method = stored.directory / CONFIG_FILE, quantization_method(settings)
    form = format_of(settings, config_file)
    form.describe(stored.metadata.values())
    table = unpacked_table(stored.tensors, form, dtype)
    if not any(isinstance(info, PackedTensor) for info in table.values()):
        raise InputError(
            f"{config_file}: field {FIELD}: says {method!r}, but no weight is packed so; remove the field if the "
            "weights are plain, or download the files again"
        )
    shared = (stored.metadata, stored.index_file, stored.stamps)
    return UnpackedCheckpoint(stored.directory, stored.files, table, *shared, stored=stored, method=method)
