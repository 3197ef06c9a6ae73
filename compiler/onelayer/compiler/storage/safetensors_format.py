"""The safetensors format: dtypes, headers and their checks."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.errors import InputError

if TYPE_CHECKING:
    pass


# Bits per element of the safetensors format; 4- and 6-bit floats may share bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# The format's own cap on a header; a larger one is an attack or not a safetensors file.
HEADER_LIMIT_BYTES = 100_000_000
# Sizes and offsets of the format have 64 bits; a tensor has as many dimensions as torch allows.
SIZE_DIGITS = 20
DIMENSIONS_LIMIT = 64


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: `start` and `end` are absolute byte offsets in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.start


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the checked tensor table of one safetensors file, and its metadata.

    Raises `InputError` naming the file and the first thing wrong with it.
    """
    try:
        size_bytes = file.stat().st_size
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 or header_bytes > min(HEADER_LIMIT_BYTES, size_bytes - 8):
                raise InputError(f"{file}: truncated or not safetensors (header size); download the file again")
            raw = stream.read(header_bytes)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); restore the file") from None
    try:
        header = json.loads(raw, parse_int=_whole)
    except (ValueError, RecursionError):
        raise InputError(f"{file}: header is not valid JSON; download the file again") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: header is not a table; download the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: header field __metadata__ is not a table of strings; download the file again")
    data_start = 8 + header_bytes
    table = {name: _checked(name, row, file, data_start, size_bytes) for name, row in header.items()}
    _check_layout(file, table, data_start, size_bytes)
    return table, metadata


def _whole(text: str) -> int:
    """Parse a whole number of a header: sizes of a thousand digits multiply for minutes and fit no file."""
    if len(text) > SIZE_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _checked(name: str, row: Any, file: Path, data_start: int, size_bytes: int) -> TensorInfo:
    """One row of a header as a `TensorInfo`, or an `InputError` naming the tensor."""
    remedy = "download the file again"
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise InputError(f"{file}: tensor {name!r} lacks dtype, shape or data_offsets; {remedy}")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{file}: tensor {name!r} has unknown dtype {str(dtype)[:40]!r}; {remedy}")
    for part, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise InputError(f"{file}: tensor {name!r} has a malformed {part}; {remedy}")
    if len(shape) > DIMENSIONS_LIMIT:
        raise InputError(f"{file}: tensor {name!r} has {len(shape)} dimensions; {remedy}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{file}: tensor {name!r} has malformed data_offsets; {remedy}")
    if data_start + offsets[1] > size_bytes:
        raise InputError(f"{file}: truncated, tensor {name!r} ends beyond the end of the file; {remedy}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InputError(f"{file}: tensor {name!r}: shape and dtype do not fit its bytes; {remedy}")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(file: Path, table: dict[str, TensorInfo], data_start: int, size_bytes: int) -> None:
    """Check that tensors tile the data section: no overlap, no hole, nothing after the last."""
    position = data_start
    for info in sorted(table.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise InputError(f"{file}: tensor {info.name!r} overlaps another or leaves a hole; download the file again")
        position = info.end
    if position != size_bytes:
        raise InputError(f"{file}: {size_bytes - position} bytes after the last tensor; download the file again")


# The format's dtype names by torch's, for those that torch can hold one element at a time.
TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
