"""Makes tiny configurations for the sweep: small, with consistent sizes, from a config class.

Sizes follow the meaning of the field names. If a class relates its fields in a way that no name shows, `OVERRIDES`
holds the values for that class. The product itself knows no model by name.
"""

import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 32, 4, 8, 2, 128
# Ids from here on are reserved for special tokens; plain text uses lower ones.
FIRST_SPECIAL_ID = 101

# Field name (whole, as a regular expression) -> tiny value. First match wins.
TINY_FIELDS: list[tuple[str, Any]] = [
    (r"(pad|bos|eos|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_(id|index)", 1),
    (r"vocab_size|text_vocab_size|n_vocab|vocab_size_per_layer_input", VOCABULARY),
    (r"num_(key_value|kv|query)_(heads|groups)|num_kv_heads|n_head_kv|multi_query_group_num|.*_key_value_heads", 2),
    (r".*(num|n)_?.*heads?|attention_heads", HEADS),
    (r"(.*_)?num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth", LAYERS),
    (r"num_(temporal|local|global|shared|dense|fusion|query_encoder|audio_|formula_)*_?(hidden_)?layers", LAYERS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(.*_)?head_dim|d_kv|kv_channels|head_size|rotary_dim", HEAD_DIM),
    (r"(q|kv|o)_lora_rank|lora_rank.*|.*_lora_rank|laurel_rank|adapter_rank", 16),
    (r".*(intermediate|ffn|ff)_(size|dim|hidden_size)|d_ff|n_inner|ffn_hidden_size|d_inner", 64),
    (r"moe_.*size|expert_.*size|shared_expert_.*size", 32),
    (r"(n|num)_(routed_|local_|total_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok|num_selected_experts|moe_k|moe_top_?k|top_k|num_experts_per_token|top_k_experts", 2),
    (r"n_groups|mamba_ngroups", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 1),
    (r"(hidden|embedding|model|projection|embed|word_embed_proj|attention_hidden|lru|emb)_?_?(size|dim|width)", HIDDEN),
    (r"d_model|n_embd|dim|text_embed_dim|output_dim|projector_.*size|hidden_size_\w+", HIDDEN),
    (r"(out|backbone|encoder|decoder|audio|vision|text|mm|cross_attention|vit|global)_hidden_(size|dim)", HIDDEN),
    (r"(max|n)_position(s|_embeddings)?|max_sequence_length|max_seq_len|n_ctx|seq_length|context_length", 128),
    (r"max_(source|target)_positions", 64),
    (r"(sliding|attention)_window(_size)?|window|window_size", 8),
    (r"image_size|img_size", 32),
    (r"(spatial_)?patch_size", 8),
    (r"(state|ssm_state|mamba_d_state)_?(size|dim)?|mamba_d_state|time_step_rank", 16),
    (r"num_mel_bins|feature_size", 16),
    (r".*dropout.*|.*pdrop.*|.*drop_rate|layerdrop|.*layerdrop|drop_path.*", 0.0),
]  # fmt: skip
LAYER_INDEXES = r".*(index|indexes|indices|_ids|layers?)"


def tiny_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Make a configuration of `cls` with small, consistent sizes, by field names and `OVERRIDES`."""
    special = OVERRIDES.get(cls.model_type, {})
    default = _default(cls, special)
    fields: dict[str, Any] = {}
    specials: dict[Any, int] = {}
    declared = cls.__dataclass_fields__
    for name, value in vars(default).items():
        if value is None and name in cls.sub_configs_defaults:  # an encoder that a checkpoint may lack
            value = cls.sub_configs_defaults[name].default_config
        if isinstance(value, PreTrainedConfig):
            fields[name] = tiny_config(type(value)).to_dict()
        elif name in declared:
            small = _tiny_value(name, value, default, specials)
            if small is not None:
                fields[name] = small
    for name, value in special.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return cls(**fields)


def _default(cls: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """Make the class's default configuration; a few classes do not accept their own."""
    try:
        return cls()
    except (ValueError, StrictDataclassError):
        return cls(**special)


def _layers(*kinds: str) -> dict[str, list[str]]:
    return {"layer_types": [f"{kind}_attention" for kind in kinds]}


def _tiny_value(name: str, value: Any, default: PreTrainedConfig, specials: dict[Any, int]) -> Any:
    """Return the small value of one field, or None if the default may stay."""
    if re.fullmatch(r".*(num_)?(key_value|kv)_heads", name):
        own = name.replace("key_value_heads", "attention_heads")
        heads = vars(default).get(own, vars(default).get("num_heads"))
        if value is not None:
            return HEADS if value == heads else min(2, value)
        return HEADS if name == "num_key_value_heads" else None
    if name == "head_dim" and value is None:
        return HEAD_DIM
    if name in ("image_token_id", "image_token_index") and value is None:
        return FIRST_SPECIAL_ID
    if name == "window_size" and "patch_size" in vars(default):  # in pixels, not in tokens
        return 32
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, list | tuple):
        return _tiny_list(name, list(value), default)
    if isinstance(value, dict):
        return _tiny_rope(value, "mrope_section" in default.ignore_keys_at_rope_validation) if "rope" in name else None
    small = next((small for pattern, small in TINY_FIELDS if re.fullmatch(pattern, name)), None)
    if small is None and re.fullmatch(r"\w+_token_(id|index)", name) and isinstance(value, int):
        return specials.setdefault(value, FIRST_SPECIAL_ID + len(specials))
    if small is None or not isinstance(value, int | float) or (isinstance(value, float) != isinstance(small, float)):
        return None
    return min(small, value) if value > 0 else value


def _tiny_list(name: str, value: list[Any], default: PreTrainedConfig) -> list[Any] | None:
    """Return one entry per remaining layer: every kind of layer first, as far as there is room."""
    layers = vars(default).get("num_hidden_layers")
    if layers and len(value) == layers and layers > LAYERS and "token" not in name:
        kinds = list(dict.fromkeys(value)) if all(isinstance(item, str | int | float) for item in value) else value
        return (kinds + value)[:LAYERS]
    if value and all(type(item) is int for item in value) and re.fullmatch(LAYER_INDEXES, name):
        if min(value) < 0:
            return [-2, -1]
        return sorted({min(item, index) for index, item in enumerate(value)} & set(range(LAYERS)))
    return None


def _tiny_rope(value: dict[str, Any], many_axes: bool) -> dict[str, Any]:
    """Return rotary parameters that fit a tiny head, including shares for several axes if it has them."""
    found = {key: _tiny_rope(item, many_axes) if isinstance(item, dict) else item for key, item in value.items()}
    if "mrope_section" in found or (many_axes and "rope_type" in found):
        found |= {"mrope_section": [2, 1, 1]}
        found.pop("partial_rotary_factor", None)
    return found


# Values for config classes that relate fields in a way that no name shows, by `model_type`; nested configs are merged.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "chameleon": {
        "vocabulary_map": {"<image>": FIRST_SPECIAL_ID, **{f"IMGIMG{chr(65 + i)}Z": 3 + i for i in range(8)}}
    },
    "chameleon_vqgan": {"num_embeddings": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "dia_decoder": {"cross_hidden_size": HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "hidden_size": 32},
    "dots3_note_audio_encoder": {
        "adapter_in_dim": 32,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
        "hidden_size": 32,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {
        "vocabulary_map": {
            "<image>": FIRST_SPECIAL_ID,
            "<|extra_200|>": FIRST_SPECIAL_ID + 1,
            **{f"<|visual token {i:06d}|>": 3 + i for i in range(8)},
        }
    },
    "emu3_vqgan": {"codebook_size": 8},
    "encoder-decoder": {"decoder_start_token_id": 2},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
        **_layers("sliding", "full", "sliding", "full"),
    },
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_layers("sliding", "full", "sliding", "full")},
    "glm4v_moe_text": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "image_grid_pinpoints": [[32, 32]],
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "2/4",
        "vision_config": {"hidden_size": 64},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "llama4_vision_model": {
        "intermediate_size": 128,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mimi": {"num_filters": 8, "upsample_groups": 32},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"vision_output_dim": 96},
    "mamba2": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neomme": {"head_dim": 16},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "rwkv": {"rescale_every": 0},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6, "mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 8},
    "t5": {"decoder_start_token_id": 0},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
