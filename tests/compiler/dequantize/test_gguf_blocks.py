"""Unpacking of GGUF blocks equals that of the package gguf bit for bit, for every type."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onelayer.compiler.dequantize import gguf
from onelayer.compiler.storage.gguf_format import TYPE_IDS, TYPES
from onelayer.compiler.storage.safetensors_format import TensorInfo

quants = pytest.importorskip("gguf.quants")
NAN = 0x7FC00000


def bits(values: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Return the bits of floats; which one of all NaNs it is does not matter."""
    return np.where(np.isnan(values), np.int32(NAN), np.ascontiguousarray(values).view(np.int32))


@pytest.mark.parametrize("name", [name for name in TYPE_IDS if name != "F64"])
def test_every_type_unpacks_as_the_package_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "SLICE_BYTES", 4 * 256 * 5)  # slices of 5 blocks, and a rest
    _, block, block_bytes = TYPES[TYPE_IDS[name]]
    rows, in_row = 6, 1280 // block
    packed = np.random.default_rng(1).integers(0, 256, (rows, in_row * block_bytes), dtype=np.uint8)
    kind = import_module("gguf.constants").GGMLQuantizationType(TYPE_IDS[name])
    with np.errstate(all="ignore"):
        expected = quants.dequantize(packed, kind)
        part = TensorInfo("weight", Path("model.gguf"), name, (rows, 1280), 0, packed.size)
        found = gguf._unpacked(part, torch.from_numpy(packed), torch.float32).numpy()
    assert found.dtype == np.float32
    assert np.isfinite(expected).mean() > 0.5
    np.testing.assert_array_equal(bits(found), bits(expected))
