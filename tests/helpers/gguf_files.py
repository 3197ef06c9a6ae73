"""A tiny Llama as a GGUF file, written by the package gguf as llama.cpp's converter does."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from helpers.tiny_models import DECODER, seeded, tiny_llama, tiny_tokenizer

# Names in a GGUF file by those in transformers, of one layer and of the rest.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_gguf(file: Path, kind: str = "Q8_0", tied: bool = False, **sizes: int) -> Any:
    """Write a model with its matrices in one type, its tokenizer too; return the gguf package's reader of the file.

    `sizes` are fields of the configuration in place of those of `DECODER`.
    """
    gguf: Any = import_module("gguf")
    model = seeded(lambda: tiny_llama(tie_word_embeddings=tied, **sizes))
    shape = {**DECODER, **sizes}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocab_size"])
    _add_tokenizer(writer, gguf)
    state = model.state_dict()
    for name, parameter in _named(shape["num_hidden_layers"]):
        if name == "output" and tied:
            continue
        values = state[f"{parameter}.weight"].numpy()
        wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(file)


def _named(layers: int) -> list[tuple[str, str]]:
    blocks = [
        (f"blk.{n}.{name}", f"model.layers.{n}.{parameter}") for n in range(layers) for name, parameter in LAYER.items()
    ]
    return [*blocks, *REST.items()]


def _add_tokenizer(writer: Any, gguf: Any) -> None:
    tokenizer = tiny_tokenizer()
    # Byte-level tokens, which mark spaces by another letter.
    model = json.loads(tokenizer.backend_tokenizer.to_str().replace("▁", "Ġ"))["model"]
    tokens = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def corrupted(file: Path, at: int, value: bytes) -> None:
    """Overwrite some bytes of a file."""
    content = bytearray(file.read_bytes())
    content[at : at + len(value)] = value
    file.write_bytes(bytes(content))
