"""Formats that other libraries unpack. Each test needs its library, and says which surface of it broke."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import quantized_models as packers
from helpers.tiny_models import save_tiny
from onelayer.compiler.dequantize import formats
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.streamed_model import StreamedModel

GROUP_16 = {"strategy": "group", "group_size": 16}
CHANNEL = {"strategy": "channel"}
COMPRESSED: dict[str, Any] = {
    "int4": ("llama", packers.compressed_int4, ("pack-quantized", {"num_bits": 4, "type": "int", **GROUP_16})),
    "int4_mixture": (
        "qwen3_moe",
        packers.compressed_int4,
        ("pack-quantized", {"num_bits": 4, "type": "int", **GROUP_16}),
    ),
    "fp8": ("llama", packers.compressed_fp8, ("float-quantized", {"num_bits": 8, "type": "float", **CHANNEL})),
    "nvfp4": (
        "llama",
        packers.compressed_nvfp4,
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    ),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_are_what_was_packed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    kind, packer, (form, weights) = COMPRESSED[name]
    truth = packers.save_quantized(tmp_path, kind, packers.compressed_settings(form, **weights), packer)
    streamed = StreamedModel(tmp_path)
    assert streamed.checkpoint.tensors.keys() == truth.keys()
    for key, wanted in truth.items():
        assert torch.equal(streamed.checkpoint.read(key), wanted), key
    settings = transformers.CompressedTensorsConfig(**packers.compressed_settings(form, **weights), dequantize=True)
    resident = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    assert_equal(resident, streamed)


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4_nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_is_what_transformers_unpacks(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_tiny("llama", tmp_path / "plain", torch.bfloat16)
    settings = transformers.BitsAndBytesConfig(**BITSANDBYTES[name], bnb_4bit_compute_dtype=torch.bfloat16)
    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    assert_equal(packed.dequantize(dtype=torch.bfloat16), StreamedModel(tmp_path / "packed"))


TORCHAO = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


@pytest.mark.parametrize("name", TORCHAO)
@pytest.mark.filterwarnings("ignore")  # torchao's own, about its extensions
def test_torchao_is_what_it_unpacks(name: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    save_tiny("llama", tmp_path / "plain", torch.bfloat16)
    settings = transformers.TorchAoConfig(getattr(quantization, TORCHAO[name])(version=2))
    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    streamed = StreamedModel(tmp_path / "packed")
    assert streamed.checkpoint.unpacking_bytes > 0
    for key, parameter in packed.named_parameters():
        wanted = parameter.dequantize() if hasattr(parameter, "qdata") else parameter
        assert torch.equal(wanted, streamed.weights.load([key])[key]), key


def assert_equal(resident: Any, streamed: StreamedModel) -> None:
    for name, parameter in resident.named_parameters():
        assert torch.equal(parameter, streamed.weights.load([name])[name]), name


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packers.save_quantized(tmp_path, "llama", packers.compressed_settings("float-quantized"), packers.compressed_fp8)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"config.json: .* by compressed-tensors, which is missing: pip install"):
        StreamedModel(tmp_path)
