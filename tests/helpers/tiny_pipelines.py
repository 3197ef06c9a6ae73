"""Tiny random diffusers pipelines: a family in, a pipeline directory out. Shapes follow diffusers' own tests."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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


def vae() -> Any:
    """Build an autoencoder that halves images, with 4 channels."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def flux(layers: int = 1) -> Any:
    """Build FLUX: flow matching, guidance distilled, packed latents."""
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(),
        tokenizer=word_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
        transformer=denoiser,
        vae=vae(),
    )


def sd3() -> Any:
    """Build Stable Diffusion 3: flow matching with three text encoders."""
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(32),
        tokenizer=word_tokenizer(),
        text_encoder_2=clip(32),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=word_tokenizer(),
        transformer=denoiser,
        vae=vae(),
    )


def sdxl() -> Any:
    """Build Stable Diffusion XL: a UNet that predicts noise."""
    denoiser = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=word_tokenizer(),
        text_encoder_2=clip(32),
        tokenizer_2=word_tokenizer(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {"flux": flux, "sd3": sd3, "sdxl": sdxl}


def save_pipeline(family: str, directory: Path, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """Build a seeded pipeline, save it, and return it. Weights that begin as zeros get noise: zeros hide mistakes."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipe = FAMILIES[family](**shape)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for parameter in part.parameters():
                    if (parameter == 0).all():
                        parameter.data.normal_(0, 0.02)
        pipe = pipe.to(dtype)
        pipe.save_pretrained(directory)
    return pipe
