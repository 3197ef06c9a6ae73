"""Weights that a checkpoint stores in several tensors: which ones, and what shape they have when unpacked. Torch-free.

In: tensor names and shapes of a checkpoint, and the format they are packed in. Out: one entry for each weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, ClassVar

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import FLOAT_NAMES
from onelayer.compiler.storage.safetensors_format import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, TensorInfo]
# The part that holds the packed values; a weight without it is not packed.
VALUES = "values"
# Of a GGUF weight: in float32, as unpacked and as arranged.
GGUF_SCRATCH_VALUE_BYTES = 8
# GGUF tables that are read by rows; transformers' reader changes them for no architecture.
GGUF_TABLES = ("token_embd.weight", "output.weight")
# Values are widened to float32 by slices of about this size, which stay in a core's cache. With what the
# allocator keeps between them they take as much as this many (measured: 9).
SLICE_BYTES = 1 << 20
SLICES_AT_ONCE = 12
DESCRIPTION_LIMIT_BYTES = 1 << 16
REMEDY = "download the file again"


class UnsupportedError(ValueError):
    """A variant of a format that cannot be unpacked; the message follows the format's name."""


class Unpacker(ABC):
    """Makes a weight of the tensors that it is stored in."""

    # Working memory of an unpacking, in bytes for each value of the weight. Most formats unpack slice by slice.
    scratch_value_bytes: ClassVar[int] = 0

    @abstractmethod
    def unpack(
        self, info: "PackedTensor", tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype"
    ) -> "torch.Tensor":
        """Return a weight from the tensors of its parts, on the host, in `dtype`."""

    def unpack_rows(self, part: TensorInfo, rows: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
        """Return some rows of a weight from those rows of its only part; for weights that are read by rows."""
        raise NotImplementedError


class PackedFormat(Unpacker):
    """One way to pack weights, known by the endings of names.

    `endings` gives the part that a tensor is, by the ending of its name. What precedes the ending is the stem that the
    parts of a weight share; `plain_ending` makes it the name of the unpacked weight.
    """

    endings: ClassVar[Mapping[str, str]]
    plain_ending: ClassVar[str] = ".weight"
    packs_only_experts: ClassVar[bool] = False
    # The package that unpacks, where it is not this one.
    library: ClassVar[str | None] = None

    @property
    @abstractmethod
    def value_bits(self) -> float:
        """Bits on disk for each value, with its share of the scales."""

    def describe(self, metadata: Iterable[Mapping[str, str]]) -> None:
        """Take what the headers of all files say besides names and shapes."""
        self.described = {name: text for part in metadata for name, text in part.items()}

    @abstractmethod
    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the unpacked weight `name`. Raises `ValueError` with a reason if its parts disagree."""


@dataclass(frozen=True)
class PackedTensor(TensorInfo):
    """A weight that is stored in `parts`. Its place in the file is that of its values, its dtype the unpacked one.

    With `by_rows` a row of it is a row of its only part.
    """

    unpacker: Unpacker = field(kw_only=True)
    parts: Parts = field(kw_only=True)
    by_rows: bool = field(kw_only=True, default=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight when it is unpacked."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(part.size_bytes for part in self.parts.values())

    @property
    def unpacking_bytes(self) -> int:
        """Bytes that unpacking holds in addition to the result."""
        return unpacking_bytes(self.stored_bytes, prod(self.shape), self.unpacker.scratch_value_bytes)


def unpacking_bytes(stored_bytes: int, values: int, scratch_value_bytes: int) -> int:
    """Bound what unpacking a weight holds in addition to the weight: what is stored, and its working memory."""
    return stored_bytes + scratch_value_bytes * values + SLICES_AT_ONCE * min(SLICE_BYTES, 4 * values)


def unpacked_table(tensors: Mapping[str, TensorInfo], form: PackedFormat, dtype: str) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with one entry of `dtype` for each packed weight.

    Raises `InputError` naming the file and the weight whose parts are missing or do not fit each other.
    """
    groups = _groups(tensors, form.endings)
    packed = {stem: parts for stem, parts in groups.items() if _is_packed(parts)}
    table = {}
    for name, info in tensors.items():
        stem, part = _split(name, form.endings)
        if stem not in packed:
            table[name] = info
        elif part == VALUES:
            plain = stem + form.plain_ending
            table[plain] = _packed(plain, packed[stem], form, dtype)
    return table


def require(condition: bool, reason: str) -> None:
    """Raise `ValueError` with `reason` unless the condition holds."""
    if not condition:
        raise ValueError(reason)


def small_bytes(info: TensorInfo) -> bytes:
    """Read the bytes of a small tensor, which describes another. Raises `ValueError` if it is not small."""
    require(info.size_bytes <= DESCRIPTION_LIMIT_BYTES, f"is described by {info.size_bytes} bytes")
    with open(info.file, "rb") as file:
        file.seek(info.start)
        return file.read(info.size_bytes)


def _packed(name: str, parts: Parts, form: PackedFormat, dtype: str) -> PackedTensor:
    values = parts[VALUES]
    try:
        shape = form.shape(name, parts)
    except (ValueError, IndexError) as error:
        raise InputError(f"{values.file}: weight {name!r}: {error or 'its parts disagree'}; {REMEDY}") from None
    return PackedTensor(name, values.file, dtype, shape, values.start, values.end, unpacker=form, parts=parts)


def _groups(tensors: Mapping[str, TensorInfo], endings: Mapping[str, str]) -> dict[str, dict[str, TensorInfo]]:
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        stem, part = _split(name, endings)
        if part:
            groups.setdefault(stem, {})[part] = info
    return groups


def _split(name: str, endings: Mapping[str, str]) -> tuple[str, str]:
    """Split the name of a tensor into stem and part; a tensor that is no part has an empty one."""
    found = max((ending for ending in endings if name.endswith(ending)), key=len, default="")
    return (name.removesuffix(found), endings[found]) if found else (name, "")


def _is_packed(parts: Parts) -> bool:
    """Whether a weight has to be unpacked: float values that come alone are the weight itself."""
    return VALUES in parts and (len(parts) > 1 or parts[VALUES].dtype not in FLOAT_NAMES)
