"""Quantized originals of every format: streamed they are what transformers unpacks, else what the packer stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils.quantization_config import Mxfp4Config

from helpers import quantized_models as packers
from onelayer.compiler.dequantize import numerics
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 40, 33, 8, 60, 21, 90, 14]])
Save = Callable[[Path], dict[str, torch.Tensor]]


def fp8(kind: str, rows: int, columns: int, **more: Any) -> Save:
    def save(path: Path) -> dict[str, torch.Tensor]:
        packer = packers.fp8_block(rows, columns, byte_scales=more.get("scale_fmt") == "ue8m0")
        return packers.save_quantized(path, kind, packers.fp8_settings(rows, columns, **more), packer)

    return save


def gptq(kind: str, bits: int, group: int, **more: Any) -> Save:
    settings, packer = packers.gptq_settings(bits, group, **more), packers.gptq(bits, group, **more)
    return lambda path: packers.save_quantized(path, kind, settings, packer)


def awq(path: Path) -> dict[str, torch.Tensor]:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    return packers.save_quantized(path, "llama", settings, packers.awq(16), dtype=torch.float16)


def mxfp4(path: Path) -> dict[str, torch.Tensor]:
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return packers.save_quantized(path, "gpt_oss_wide", settings, packers.mxfp4, is_packed=packers.is_expert_stack)


FORMATS: dict[str, Save] = {
    "fp8": fp8("llama_tied", 16, 16),
    "fp8_mixture": fp8("qwen3_moe", 8, 8),
    "fp8_latent_mixture": fp8("deepseek_v3", 4, 4),
    "mxfp8": fp8("llama", 1, 32, scale_fmt="ue8m0"),
    "mxfp4": mxfp4,
    "gptq": gptq("llama", 4, 16),
    "gptq_reordered": gptq("llama", 8, 16, version=2, reordered=True),
    "gptq_mixture": gptq("qwen3_moe", 4, 16),
    "awq": awq,
    "fbgemm_fp8": lambda path: packers.save_quantized(path, "llama", {"quant_method": "fbgemm_fp8"}, packers.row_fp8),
    "fp8_partial_blocks": fp8("llama", 24, 20),
    "fp8_latent_mixture_partial_blocks": fp8("deepseek_v3", 16, 16),
}
# What transformers' own rule unpacks, where it has one that is right.
UNPACKED_BY_TRANSFORMERS: dict[str, Any] = {
    "fp8": transformers.FineGrainedFP8Config,
    "fp8_mixture": transformers.FineGrainedFP8Config,
    "fp8_latent_mixture": transformers.FineGrainedFP8Config,
    "mxfp8": transformers.FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}


def streamed_logits(streamed: StreamedModel) -> torch.Tensor:
    found: dict[int, Any] = {}
    with Meter(CPU) as meter:
        Stream(streamed, CPU, meter).run([{"input_ids": IDS}], found.__setitem__)
    logits = found[0].logits
    return logits.materialize() if isinstance(logits, DeferredLogits) else logits


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_was_packed(name: str, tmp_path: Path) -> None:
    truth = FORMATS[name](tmp_path)
    streamed = StreamedModel(tmp_path)
    checkpoint = streamed.checkpoint
    assert checkpoint.tensors.keys() == truth.keys()
    for key, wanted in truth.items():
        assert torch.equal(checkpoint.read(key), wanted), key
        assert checkpoint.tensors[key].shape == tuple(wanted.shape)
        assert checkpoint.tensors[key].size_bytes == wanted.nbytes
    assert checkpoint.bytes_read == sum(info.size_bytes for info in stored_tensors(tmp_path))


@pytest.mark.parametrize("name", UNPACKED_BY_TRANSFORMERS)
def test_streamed_equals_the_resident_model_that_transformers_unpacks(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    settings = UNPACKED_BY_TRANSFORMERS[name](dequantize=True)
    resident = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    with torch.no_grad():
        expected = resident(input_ids=IDS).logits
    assert torch.equal(streamed_logits(StreamedModel(tmp_path)), expected)


def test_embedding_and_head_are_still_read_by_rows(tmp_path: Path) -> None:
    FORMATS["fp8_partial_blocks"](tmp_path)
    streamed = StreamedModel(tmp_path)
    assert streamed.lazy == {"model.embed_tokens.weight", "lm_head.weight"}


def stored_tensors(path: Path) -> list[Any]:
    from onelayer.compiler.storage.checkpoint import Checkpoint

    return list(Checkpoint.open(path).tensors.values())


REFUSED: dict[str, dict[str, Any]] = {
    **{method: {"quant_method": method} for method in ("aqlm", "vptq", "hqq", "quark", "spqr")},
    "gptq' weights with 3 bits": {"quant_method": "gptq", "bits": 3},
    "awq' weights in the layout 'gemv'": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "compressed-tensors' weights in the layout 'marlin-24'": packers.compressed_settings("marlin-24", num_bits=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path) -> None:
    FORMATS["fp8"](tmp_path)
    packers.edit_config(tmp_path, quantization_config=REFUSED[name])
    with pytest.raises(InputError, match=rf"config.json: field quantization_config: '{name}.* cannot be .*; give the"):
        StreamedModel(tmp_path)


def test_a_slice_is_no_larger_where_a_block_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    multiply = numerics._multiply

    def counted(wide: torch.Tensor, *arguments: Any) -> None:
        rows.append(len(wide))
        multiply(wide, *arguments)

    monkeypatch.setattr(numerics, "_multiply", counted)
    values, scales = torch.randn(300, 20).to(torch.float8_e4m3fn), torch.rand(3, 3)
    wanted = values.float() * scales.repeat_interleave(128, 0)[:300].repeat_interleave(8, 1)[:, :20]
    for most in (50, 128, 200, 256, 1000):
        monkeypatch.setattr(numerics, "SLICE_BYTES", 4 * 20 * most)
        rows.clear()
        assert torch.equal(numerics.scale_blocks(values, scales, (128, 8), (300, 20), torch.float32), wanted)
        assert max(rows) <= most
        assert sum(rows) == 300
