"""GGUF tensors in, weights by their names in transformers out, as transformers itself reads such a file.

Used here, and nowhere else: `get_gguf_hf_weights_map`, `TENSOR_PROCESSORS` and `TensorProcessor` of transformers'
reader, which give names and undo llama.cpp's permutations; `get_tensor_name_map`, which they call, and `dequantize` of
the package gguf.
`tests/compiler/dequantize/test_gguf.py` shows which one broke.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, ClassVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as reading

from onelayer.compiler.dequantize.checkpoint import UnpackedCheckpoint
from onelayer.compiler.dequantize.gguf_blocks import BLOCKS, unpack_blocks
from onelayer.compiler.dequantize.packed import (
    GGUF_SCRATCH_VALUE_BYTES,
    GGUF_TABLES,
    SLICE_BYTES,
    PackedTensor,
    Unpacker,
    require,
)
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.gguf_format import TYPE_IDS, TYPES
from onelayer.compiler.storage.safetensors_format import TensorInfo

# Whole numbers by the bytes of a float.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def named_by_transformers(stored: Checkpoint, model: PreTrainedModel, dtype: str) -> Checkpoint:
    """Return a GGUF file's tensors as the weights of `model`, which is empty, in `dtype`.

    Raises `InputError` if the package gguf is missing.
    """
    (file,) = stored.files
    try:
        form = GgufWeights(stored.metadata[file]["general.architecture"], model)
    except ImportError:
        raise InputError(f"{file}: reading GGUF needs the package gguf, which is missing: pip install gguf") from None
    parts: dict[str, dict[str, TensorInfo]] = {}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, info in stored.tensors.items():
        weight = form.names.get(name) or form.names.get(name.removesuffix(".weight"))
        if weight in expected:
            parts.setdefault(weight, {})[name] = info
    table: dict[str, TensorInfo] = {}
    for weight, own in parts.items():
        first, shape = next(iter(own.values())), expected[weight]
        if sum(prod(info.shape) for info in own.values()) != prod(shape):
            shapes = ", ".join(f"{name} {info.shape}" for name, info in own.items())
            raise InputError(f"{file}: {shapes} do not make {weight} {shape}; download the file again")
        by_rows = first.name in GGUF_TABLES and first.shape == shape
        place = (weight, file, dtype, shape, first.start, first.end)
        table[weight] = PackedTensor(*place, unpacker=form, parts=own, by_rows=by_rows)
    shared = (stored.metadata, None, stored.stamps)
    return UnpackedCheckpoint(stored.directory, stored.files, table, *shared, stored=stored, method="gguf")


class _Bits(np.ndarray[Any, Any]):
    """Floats as whole numbers of as many bits: numpy has no bfloat16. They can be moved; arithmetic is refused."""

    __array_ufunc__ = None  # type: ignore[assignment]  # how numpy says that operands refuse


class GgufWeights(Unpacker):
    """The tensors of one GGUF file; `names` are those of weights by those in the file.

    A weight has one part, or several: the gates and twins of experts lie apart in the file.
    """

    scratch_value_bytes: ClassVar[int] = GGUF_SCRATCH_VALUE_BYTES

    def __init__(self, architecture: str, model: PreTrainedModel) -> None:
        kind = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
        self._processor: Any = cast("Any", kind)(config=model.config.to_dict())
        with _one_name_map():
            self.names: dict[str, str] = reading.get_gguf_hf_weights_map(model, self._processor)

    def unpack(self, info: PackedTensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Unpack every part and let transformers arrange it; what it also computes with is in float32."""
        try:
            weight = self._arranged(info, tensors, dtype, only_moved=True)
        except TypeError:
            weight = self._arranged(info, tensors, torch.float32, only_moved=False)
        require(tuple(weight.shape) == info.shape, f"unpacks to {tuple(weight.shape)}, not {info.shape}")
        return weight.to(dtype)

    def _arranged(
        self, info: PackedTensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, only_moved: bool
    ) -> torch.Tensor:
        """Return a weight in `dtype`. Raises `TypeError` with `only_moved` if transformers computes with values."""
        made: dict[str, Any] = {"tensors": {}}
        for name, rows in tensors.items():
            values = _unpacked(info.parts[name], rows, dtype)
            arranged = self._processor.process(
                weights=values.view(BITS[dtype.itemsize]).numpy().view(_Bits) if only_moved else values.numpy(),
                name=name,
                tensor_key_mapping=self.names,
                parsed_parameters=made,
            )
            if arranged.name is not None:
                made["tensors"][info.name] = torch.from_numpy(np.ascontiguousarray(arranged.weights))
        weight: torch.Tensor = made["tensors"][info.name]
        return weight.view(dtype)

    def unpack_rows(self, part: TensorInfo, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Unpack some rows of a table; a row is a whole number of blocks."""
        return _unpacked(part, rows, dtype)


@contextmanager
def _one_name_map() -> Iterator[None]:
    """Make the package's table of names once: transformers makes it for every module (19 ms each for 30 layers)."""
    package: Any = import_module("gguf")
    make = package.get_tensor_name_map
    package.get_tensor_name_map = cache(make)
    try:
        yield
    finally:
        package.get_tensor_name_map = make


def _unpacked(part: TensorInfo, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpack rows of bytes (n, row bytes) to `dtype` (n, ...), by slices in float32."""
    _, block, block_bytes = TYPES[TYPE_IDS[part.dtype]]
    packed = rows.view(-1, block_bytes)
    unpacked = torch.empty(len(packed), block, dtype=dtype)
    step = max(1, SLICE_BYTES // (4 * block))
    unpack = unpack_blocks if part.dtype in BLOCKS else _by_the_package
    for some, values in zip(packed.split(step), unpacked.split(step), strict=True):
        values.copy_(unpack(some, part.dtype))
    return unpacked.view(len(rows), *part.shape[1:])


def _by_the_package(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """Unpack blocks (n, bytes of a block) to float32 (n, values of a block)."""
    quantized = import_module("gguf.constants").GGMLQuantizationType(TYPE_IDS[name])
    one_row = blocks.numpy().reshape(1, -1)  # the package takes 16 rows at a time
    unpacked: torch.Tensor = torch.from_numpy(import_module("gguf.quants").dequantize(one_row, quantized))
    return unpacked.view(len(blocks), -1)
