"""Tiny random vision-language models with processors of their own, offline: a family's name in, a directory out.

Images become at most a few dozen tokens. Processors are built without torchvision, as `media/processors.py` loads them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as library
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onelayer.compiler.media.processors import without_video

transformers: Any = library  # its classes are only partly typed
WIDTH, SIZE, PATCH = 32, 32, 8
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    **SPECIAL,
}
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SQUARE = {"height": SIZE, "width": SIZE}
WORDS = "what is the value of the field name ? the answer is a thing"

Family = Callable[..., tuple[Any, Any]]  # makes a model and its processor


def template(image: str) -> str:
    """Write a chat template that shows an image as `image`, and marks what the assistant writes."""
    return (
        "{% macro body(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}"
        "{% if p['type'] == 'text' %}{{ p['text'] }}{% elif p['type'] == 'image' %}" + image + "{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}"
        "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ body(m['content']) }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ body(m['content']) }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def tokenizer(special: Sequence[str], image: str, named: dict[str, str] | None = None) -> Any:
    """Train a byte-level tokenizer of 300 tokens; `special` are those of images."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template(image),
        additional_special_tokens=list(special),
        **({"extra_special_tokens": named} if named else {}),
    )


def _processor(name: str, image_processor: Any, text: Any, **fields: Any) -> Any:
    cls = without_video(getattr(transformers, name))
    parts = [None] if "video_processor" in getattr(transformers, name).get_attributes() else []
    return cls(image_processor, text, *parts, chat_template=text.chat_template, **fields)


def _qwen(family: str, text: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, Any]:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = tokenizer(marks, "<|vision_start|><|image_pad|><|vision_end|>")
    ids = tokens.convert_tokens_to_ids
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "vocab_size": len(tokens), **text},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": WIDTH,
            **vision,
        },
        image_token_id=ids(marks[0]),
        video_token_id=ids(marks[1]),
        vision_start_token_id=ids(marks[2]),
        vision_end_token_id=ids(marks[3]),
        tie_word_embeddings=False,
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")
    return model(config), _processor(f"{family}Processor", images, tokens)


def _qwen2_5_vl() -> tuple[Any, Any]:
    text = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
    return _qwen("Qwen2_5_VL", text, {"window_size": 32, "fullatt_block_indexes": [1]})


def _qwen3_vl() -> tuple[Any, Any]:
    rope = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"head_dim": 8, "num_hidden_layers": 3, "rope_parameters": rope}
    return _qwen("Qwen3VL", text, {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64})


def _internvl() -> tuple[Any, Any]:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokens = tokenizer(list(names.values()), "<IMG_CONTEXT>\n", names)
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokens)},
        vision_config={**TOWER, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = transformers.GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True)
    processor = _processor("InternVLProcessor", images, tokens, image_seq_length=4)
    return transformers.InternVLForConditionalGeneration(config), processor


def _llava(side: int = SIZE, patch: int = PATCH, width: int = WIDTH) -> tuple[Any, Any]:
    """Make a LLaVA that reads images of a side in pixels; `width` is that of its tower."""
    tokens = tokenizer(["<image>"], "<image>\n")
    tower: dict[str, Any] = {"image_size": side, "patch_size": patch, "hidden_size": width}
    tower |= {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": width}
    tower["intermediate_size"] = 2 * width
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokens)},
        vision_config={**TOWER, **tower},
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2,
    )
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = transformers.CLIPImageProcessorPil(**size)
    given = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaForConditionalGeneration(config), _processor("LlavaProcessor", images, tokens, **given)


def _llava_onevision() -> tuple[Any, Any]:
    tokens = tokenizer(["<image>", "<video>"], "<image>\n")
    grid = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokens)},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "num_hidden_layers": 3},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        video_token_id=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
    given = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = _processor("LlavaOnevisionProcessor", images, tokens, **given)
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _idefics(family: str) -> tuple[Any, Any]:
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    video = ["<video>"] if family == "SmolVLM" else []
    marks = ["<image>", *video, "<fake_token_around_image>", "<global-img>", *parts, "<end_of_utterance>"]
    tokens = tokenizer(marks, "<image>")
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokens)},
        vision_config=TOWER,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = getattr(transformers, f"{family}ImageProcessorPil")(
        size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    return model, _processor(f"{family}Processor", images, tokens, image_seq_len=4)


def _gemma3() -> tuple[Any, Any]:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = tokenizer(list(names.values()), "<start_of_image>", names)
    ids = tokens.convert_tokens_to_ids
    layers = ["sliding_attention", "full_attention"]
    text = {"head_dim": 8, "sliding_window": 16, "layer_types": layers, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokens), **text},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )
    images = transformers.Gemma3ImageProcessorPil(size=SQUARE)
    processor = _processor("Gemma3Processor", images, tokens, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, Any]:
    tokens = tokenizer(["<image>"], "<image>", {"image_token": "<image>"})
    images = transformers.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    tower = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": WIDTH}
    processor = _processor("PaliGemmaProcessor", images, tokens)
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(tokens), "head_dim": 8, "num_image_tokens": 16},
        vision_config=tower,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        pad_token_id=0,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _mllama() -> tuple[Any, Any]:
    tokens = tokenizer(["<|image|>", "<|python_tag|>"], "<|image|>")
    vision = {
        **{name: value for name, value in TOWER.items() if name != "num_attention_heads"},
        "attention_heads": 4,
        "num_global_layers": 1,
        "vision_output_dim": 2 * WIDTH,
        "intermediate_layers_indices": [1],
        "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokens),
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": ROPE,
        },
        vision_config=vision,
        image_token_index=tokens.convert_tokens_to_ids("<|image|>"),
    )
    images = transformers.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    return transformers.MllamaForConditionalGeneration(config), _processor("MllamaProcessor", images, tokens)


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mllama": _mllama,
}


def save_vision_model(family: str, directory: Path, **changes: Any) -> Any:
    """Save a seeded tiny model of a family with its processor, and return the model; norms and biases get noise.

    `changes` are arguments of the family.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[family](**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.dtype = torch.float32
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model.eval()
