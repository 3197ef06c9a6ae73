"""Unpacking of GGUF blocks equals that of the package gguf bit for bit, and what is computed then is in float32."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from onelayer.compiler.dequantize import gguf
from onelayer.compiler.dequantize.packed import PackedTensor
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


def test_a_weight_that_transformers_computes_with_is_computed_in_float32() -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 8}
    config = Gemma2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        form = gguf.GgufWeights("gemma2", Gemma2ForCausalLM(config))
    part, weight = "blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"
    assert form.names[part] == weight
    stored = torch.linspace(0.9, 1.1, 16)  # rounded to bfloat16 before 1 is taken away, they would lose most digits
    place = (Path("model.gguf"), "F32", (16,), 0, 64)
    info = PackedTensor(weight, *place, unpacker=form, parts={part: TensorInfo(part, *place)})
    found = form.unpack(info, {part: stored.view(torch.uint8).view(16, 4)}, torch.bfloat16)
    assert torch.equal(found, (stored - 1).bfloat16())
