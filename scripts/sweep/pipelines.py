"""Tiny random diffusers pipelines: a family in, a pipeline directory out. Shapes follow diffusers' own tests."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from scripts.sweep.pipeline_parts import (
    byte_tokenizer,
    clip,
    deep_vae,
    gemma,
    qwen3,
    qwen_vae,
    qwen_vl,
    t5,
    umt5,
    vae,
    video_vae,
    word_tokenizer,
)


def flux(layers: int = 1, heads: int = 4) -> Any:
    """Build FLUX: flow matching, guidance distilled, packed latents."""
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=16,
        num_attention_heads=heads,
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


def wan() -> Any:
    """Build Wan: flow matching of videos, of one frame here."""
    denoiser = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        transformer=denoiser,
        vae=video_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=umt5(),
        tokenizer=word_tokenizer(),
    )


def qwen() -> Any:
    """Build Qwen-Image: packed latents of a video autoencoder, and prompts from a chat template."""
    denoiser = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}
    return diffusers.QwenImagePipeline(
        transformer=denoiser,
        vae=qwen_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        text_encoder=qwen_vl(),
        tokenizer=byte_tokenizer(),
    )


def sana() -> Any:
    """Build Sana: linear attention, and flow matching under a solver's name."""
    denoiser = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=32,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.SanaPipeline(
        transformer=denoiser,
        vae=deep_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**flow),
        text_encoder=gemma(),
        tokenizer=byte_tokenizer(),
    )


def pixart() -> Any:
    """Build PixArt-Sigma: it predicts noise, and a variance next to it."""
    denoiser = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=denoiser,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )


def zimage() -> Any:
    """Build Z-Image: lists of samples and prompts, and a prediction with the other sign."""
    denoiser = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=denoiser,
        vae=vae(16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen3(),
        tokenizer=byte_tokenizer(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "sd3": sd3,
    "sdxl": sdxl,
    "wan": wan,
    "qwen": qwen,
    "sana": sana,
    "pixart": pixart,
    "zimage": zimage,
}


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
