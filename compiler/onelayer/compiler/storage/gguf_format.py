"""The GGUF format (llama.cpp): types, headers and their checks. Torch-free.

Every header is hostile until checked: counts, lengths, types and offsets must agree with the file before a byte of
weight is read.
"""

import struct
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.safetensors_format import TensorInfo

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Names of tensor types, with the values of a block and its bytes.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
# Kinds of metadata: a struct code for each number, then strings and arrays.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
ALIGNMENT = 32
DIMENSIONS_LIMIT = 4
KEY_LIMIT_BYTES = 1 << 16


def read_gguf_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the checked tensor table of one GGUF file, shapes as torch has them, and its short metadata as text.

    Raises `InputError` naming the file and the first thing wrong with it.
    """
    try:
        size_bytes = file.stat().st_size
        with open(file, "rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            return _Header(file, content, size_bytes).read()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); restore the file") from None
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        reason = str(error) if type(error) is ValueError else "truncated, or damaged"
        raise InputError(f"{file}: is no valid GGUF file ({reason}); download the file again") from None


class _Header:
    """A cursor over the header of a GGUF file; reading beyond the end raises `struct.error` or `ValueError`."""

    def __init__(self, file: Path, content: mmap, size_bytes: int) -> None:
        self.file = file
        self.content = content
        self.size_bytes = size_bytes
        self.position = 0

    def read(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Read and check all of it."""
        if self.content[:4] != MAGIC:
            raise ValueError("its first bytes are not GGUF")
        self.position = 4
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}")
        tensors, entries = self._numbers("QQ")
        # The least that an entry and a tensor take.
        if 13 * entries + 24 * tensors > self.size_bytes:
            raise ValueError(f"{tensors} tensors and {entries} entries do not fit the file")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text(KEY_LIMIT_BYTES)
            (kind,) = self._numbers("I")
            metadata[key] = self._value(kind)
        if (metadata.get("split.count") or 1) > 1:
            raise ValueError(f"one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
        rows = [self._tensor_row() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"alignment {alignment}")
        start = -(-self.position // alignment) * alignment
        table = {name: self._placed(name, row, start) for name, *row in rows}
        if len(table) != len(rows):
            raise ValueError("two tensors have one name")
        return table, {key: str(value) for key, value in metadata.items() if value is not None}

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self.content, self.position)
        self.position += struct.calcsize(f"<{codes}")
        return values

    def _skip(self, count_bytes: int) -> None:
        if count_bytes > self.size_bytes - self.position:
            raise ValueError("truncated")
        self.position += count_bytes

    def _text(self, limit_bytes: int | None = None) -> str:
        (length,) = self._numbers("Q")
        if limit_bytes is not None and length > limit_bytes:
            raise ValueError(f"a name of {length} bytes")
        start = self.position
        self._skip(length)
        return bytes(self.content[start : self.position]).decode()

    def _value(self, kind: int) -> Any:
        """Read one value; arrays are passed over, and None stands for them."""
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"metadata of kind {kind}")
        inner, count = self._numbers("IQ")
        if inner in NUMBERS:
            self._skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
        elif inner == STRING:
            if 8 * count > self.size_bytes - self.position:
                raise ValueError("truncated")
            self._skip_texts(count)
        else:
            raise ValueError(f"an array of kind {inner}")
        return None

    def _skip_texts(self, count: int) -> None:
        """Pass over texts; a tokenizer has hundreds of thousands."""
        read, position = LENGTH.unpack_from, self.position
        for _ in range(count):
            position += LENGTH.size + read(self.content, position)[0]
        self._skip(position - self.position)

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(KEY_LIMIT_BYTES)
        (dimensions,) = self._numbers("I")
        if not 0 < dimensions <= DIMENSIONS_LIMIT:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._numbers("Q" * dimensions)[::-1]
        return (name, shape, *self._numbers("IQ"))

    def _placed(self, name: str, row: list[Any], start: int) -> TensorInfo:
        shape, kind, offset = row
        if kind not in TYPES:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        dtype, block, block_bytes = TYPES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r}: {shape} is not in whole blocks of {dtype}")
        end = start + offset + prod(shape) // block * block_bytes
        if end > self.size_bytes:
            raise ValueError(f"truncated, tensor {name!r} ends beyond the end of the file")
        return TensorInfo(name, self.file, dtype, shape, start + offset, end)
