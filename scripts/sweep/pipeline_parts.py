"""Tiny random parts of diffusers pipelines: tokenizers, text encoders and autoencoders."""

from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = ("a photo of sks dog cat red green blue circle square triangle on the white field in small large and").split()  # noqa: SIM905


def word_tokenizer() -> Any:
    """Build a tokenizer of words; pipelines only call it."""
    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapper: Any = transformers.PreTrainedTokenizerFast
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return wrapper(tokenizer_object=words, model_max_length=77, **special)


def clip(projection: int | None = None) -> Any:
    """Build a text encoder like CLIP's."""
    config = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=64,
        projection_dim=projection or 32,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5() -> Any:
    """Build a text encoder like T5's."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4) -> Any:
    """Build an autoencoder that halves images."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def umt5() -> Any:
    """Build a text encoder like Wan's."""
    config = transformers.UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.UMT5EncoderModel(config)


def byte_tokenizer() -> Any:
    """Build a tokenizer of bytes with a chat template, for text encoders that are language models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *alphabet])}
    letters = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    wrapper: Any = transformers.PreTrainedTokenizerFast
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    built = wrapper(tokenizer_object=letters, model_max_length=512, **special)
    built.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return built


def qwen_vl() -> Any:
    """Build a text encoder like Qwen-Image's: a vision-language model that sees texts only."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
            "vocab_size": 300,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=252,
        vision_end_token_id=253,
        image_token_id=255,
        video_token_id=256,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma() -> Any:
    """Build a text encoder like Sana's."""
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=300,
        )
    )


def qwen3() -> Any:
    """Build a text encoder like Z-Image's."""
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=300,
            max_position_embeddings=512,
        )
    )


def video_vae() -> Any:
    """Build Wan's autoencoder of videos, with 16 channels."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def qwen_vae() -> Any:
    """Build Qwen-Image's autoencoder of videos, with 4 channels."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.5, 2.0, 2.5],
    )


def deep_vae() -> Any:
    """Build Sana's autoencoder, which has no distribution, with 4 channels."""
    blocks = ("ResBlock", "EfficientViTBlock")
    scales: Any = ((), (5,))
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
