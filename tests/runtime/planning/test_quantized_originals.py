"""Plans of quantized originals by their published shapes, from a configuration or from headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from onelayer.compiler.storage.safetensors_format import DTYPE_BITS
from onelayer.runtime import plan_run
from onelayer.runtime.planning.read_shapes import read_shapes

GIB = 1 << 30
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "dtype": "bfloat16",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": FP8,
}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "quantization_config": FP8,
}
# Parameters and bytes of the published checkpoints, in billions; of DeepSeek-V3 without the layer that predicts twice.
PUBLISHED = {
    "gpt-oss-20b": (GPT_OSS, 20.9, 13.76),
    "DeepSeek-V3": (DEEPSEEK, 671, 673),
    "Qwen3-235B": (QWEN, 235.1, 236.4),
}


def write_config(directory: Path, document: dict[str, Any], **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_gives_parameters_and_stored_bytes(name: str, tmp_path: Path) -> None:
    document, parameters, stored = PUBLISHED[name]
    write_config(tmp_path, document)
    shapes = read_shapes(tmp_path)
    assert shapes.parameters == pytest.approx(parameters * 1e9, rel=0.01)
    assert shapes.stored_bytes == pytest.approx(stored * 1e9, rel=0.015)
    assert shapes.unpacked_bytes == 2 * shapes.parameters


def write_headers(directory: Path, tensors: dict[str, tuple[str, list[int]]]) -> int:
    """Write a checkpoint that is all header: its weights are a hole in the file. Return their bytes."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPE_BITS[dtype] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return position


def gpt_oss_tensors(layers: int) -> dict[str, tuple[str, list[int]]]:
    tensors: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [201088, 2880]),
        "lm_head.weight": ("BF16", [201088, 2880]),
        "model.norm.weight": ("BF16", [2880]),
    }
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for linear, (rows, columns) in {
            "q": (4096, 2880),
            "k": (512, 2880),
            "v": (512, 2880),
            "o": (2880, 4096),
        }.items():
            tensors[f"{place}.self_attn.{linear}_proj.weight"] = ("BF16", [rows, columns])
            tensors[f"{place}.self_attn.{linear}_proj.bias"] = ("BF16", [rows])
        tensors[f"{place}.self_attn.sinks"] = ("BF16", [64])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}.{norm}.weight"] = ("BF16", [2880])
        tensors[f"{place}.mlp.router.weight"] = ("BF16", [32, 2880])
        tensors[f"{place}.mlp.router.bias"] = ("BF16", [32])
        for stack, rows in {"gate_up_proj": 5760, "down_proj": 2880}.items():
            tensors[f"{place}.mlp.experts.{stack}_blocks"] = ("U8", [32, rows, 90, 16])
            tensors[f"{place}.mlp.experts.{stack}_scales"] = ("U8", [32, rows, 90])
            tensors[f"{place}.mlp.experts.{stack}_bias"] = ("BF16", [32, rows])
    return tensors


def deepseek_layer() -> dict[str, tuple[str, list[int]]]:
    """Tensors of one layer of DeepSeek-V3 with 4 experts: 576 rows have 5 scales."""
    linears = {
        "self_attn.q_a_proj": (1536, 7168),
        "self_attn.q_b_proj": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, 7168),
        "self_attn.kv_b_proj": (32768, 512),
        "self_attn.o_proj": (7168, 16384),
    }
    for expert in ("shared_experts", *(f"experts.{number}" for number in range(4))):
        linears |= {f"mlp.{expert}.{name}_proj": (2048, 7168) for name in ("gate", "up")}
        linears[f"mlp.{expert}.down_proj"] = (7168, 2048)
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [1000, 7168])}
    for name, (rows, columns) in linears.items():
        tensors[f"model.layers.3.{name}.weight"] = ("F8_E4M3", [rows, columns])
        tensors[f"model.layers.3.{name}.weight_scale_inv"] = ("F32", [-(-rows // 128), -(-columns // 128)])
    return tensors


def test_headers_agree_with_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path, GPT_OSS)
    configured = read_shapes(tmp_path)
    stored = write_headers(tmp_path, gpt_oss_tensors(24))
    read = read_shapes(tmp_path)
    assert read.parameters == configured.parameters
    assert read.stored_bytes == stored == pytest.approx(configured.stored_bytes, rel=0.001)
    assert read.largest_block_bytes == configured.largest_block_bytes
    assert read.unpacking_bytes > 32 * 5760 * 90 * 17  # the largest stack of experts as it is stored
    planned = plan_run(tmp_path, 24 * GIB, timing=False)
    assert planned.predicted.read_bytes == planned.predicted.model_bytes == stored
    assert planned.predicted.host_bytes > 2 * read.largest_block_bytes + read.unpacking_bytes


def test_partial_blocks_of_headers_are_read(tmp_path: Path) -> None:
    write_config(tmp_path, DEEPSEEK)
    stored = write_headers(tmp_path, deepseek_layer())
    shapes = read_shapes(tmp_path)
    (block,) = shapes.blocks
    assert {linear.out_features for linear in block.linears} >= {576, 24576}
    assert block.experts is not None
    assert block.experts.count == 4
    assert shapes.stored_bytes == stored < 0.55 * shapes.unpacked_bytes


@pytest.mark.parametrize(("memory", "pays"), [(24 * GIB, False), (6 * GIB, True)])
def test_a_plan_says_where_an_emulator_does_not_pay(memory: int, pays: bool, tmp_path: Path) -> None:
    write_config(tmp_path, GPT_OSS)
    write_headers(tmp_path, gpt_oss_tensors(24))
    planned = plan_run(tmp_path, memory, timing=False)
    said = [remark for remark in planned.remarks if "does not pay" in remark]
    assert bool(said) is not pays
    assert planned.ratio is not None
