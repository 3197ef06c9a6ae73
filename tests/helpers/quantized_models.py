"""Tiny models in quantized formats, packed here by their documented layouts, and what they are when unpacked."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.mixtures import MIXTURES
from helpers.tiny_models import TINY, causal, tiny_tokenizer

Tensors = dict[str, torch.Tensor]
# Packs one weight (out, in): tensors by the ending that follows the weight's module, and the values they stand for.
Packer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Blocks of 32 need wider experts than those of `MIXTURES`.
WIDE: dict[str, Callable[[], Any]] = {
    "gpt_oss_wide": lambda: causal(
        "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, num_key_value_heads=4
    )
}
KINDS: dict[str, Callable[[], Any]] = {**MIXTURES, **TINY, **WIDE}
PLAIN = ("lm_head", "embed", "norm", "router", "mlp.gate.")


def save_quantized(
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    packer: Packer,
    *,
    is_packed: Callable[[str, torch.Tensor], bool] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensors:
    """Save a model of `KINDS` with its linears packed; return all its weights by their stored names."""
    model = KINDS[kind]().to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    truth: Tensors = {}
    stored: Tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not (is_packed or is_linear)(name, tensor):
            stored[name] = truth[name] = tensor
            continue
        parts, values = packer(tensor)
        stem = name.removesuffix("weight")
        stored |= {stem + ending: part.contiguous() for ending, part in parts.items()}
        truth[name] = values.to(dtype)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, quantization_config=dict(settings))
    return truth


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in PLAIN)


def is_expert_stack(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def fp8_block(rows: int, columns: int, byte_scales: bool = False) -> Packer:
    """FP8 with a scale for each block, in float32 or as an exponent of 2 in a byte; end blocks may be partial."""

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        height, width = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -width % columns, 0, -height % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / 448
        if byte_scales:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        product = values.float() * scale[:, None, :, None]
        stored_scale = (torch.log2(scale) + 127).to(torch.uint8) if byte_scales else scale
        flat = [part.flatten(2).flatten(0, 1)[:height, :width] for part in (values.view(torch.uint8), product)]
        return {"weight": flat[0].contiguous().view(values.dtype), "weight_scale_inv": stored_scale}, flat[1]

    return pack


def fp8_settings(rows: int, columns: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns], **more}


def mxfp4(stack: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Pack a stack of experts (E, in, out): the layout of gpt-oss, blocks of 32 along the input."""
    blocks = stack.float().mT.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = blocks / torch.exp2(exponents)[..., None]
    codes = to_fp4(scaled)
    values = (FP4[(codes & 7).int()] * torch.where(codes > 7, -1, 1)) * torch.exp2(exponents)[..., None]
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"_blocks": packed, "_scales": (exponents + 127).to(torch.uint8)}, values.flatten(-2).mT


def to_fp4(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest 4-bit float: its sign in the highest bit."""
    nearest = (values.abs()[..., None] - FP4).abs().argmin(-1)
    return (nearest + 8 * (values < 0)).to(torch.uint8)


def pack_words(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack values of `bits` into words of 32 along `dim`, from the lowest bits on."""
    parts = values.long().unflatten(dim, (-1, 32 // bits))
    shifts = bits * torch.arange(32 // bits).view(-1, *[1] * (values.ndim - dim - 1))
    words = (parts << shifts).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def in_groups(weight: torch.Tensor, group: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight (out, in) to values (in, out) with zero points and scales (groups, out)."""
    groups = weight.float().T.unflatten(0, (-1, group))
    low, high, top = groups.amin(1), groups.amax(1), 2**bits - 1
    scales = ((high - low) / top).clamp_min(1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, top)
    values = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, top)
    return values.flatten(0, 1).long(), zeros.long(), scales


def gptq(bits: int, group: int, version: int = 1, reordered: bool = False) -> Packer:
    """GPTQ; with `reordered` inputs, the groups are mixed as by `desc_act`."""

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        inputs = weight.shape[1]
        order = (
            torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) if reordered else torch.arange(inputs)
        )
        values, zeros, scales = in_groups(weight[:, order], group, bits)
        back = order.argsort()
        values, groups = values[back], (torch.arange(inputs) // group)[back]
        parts = {
            "qweight": pack_words(values, bits, 0),
            "qzeros": pack_words(zeros - int(version == 1), bits, 1),
            "scales": scales,
            "g_idx": groups.int(),
        }
        return parts, ((values - zeros[groups]).float() * scales[groups].float()).T

    return pack


def gptq_settings(bits: int, group: int, version: int = 1, reordered: bool = False) -> dict[str, Any]:
    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": reordered, "sym": False, **form}


def awq(group: int) -> Packer:
    """AWQ of 4 bits: the even outputs of a word lie in its lower half."""

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        eights = values.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack_words(eights.flatten(1), 4, 1)

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, zeros, scales = in_groups(weight, group, 4)
        parts = {"qweight": interleaved(values), "qzeros": interleaved(zeros), "scales": scales}
        wide = [part.repeat_interleave(group, 0) for part in (zeros, scales)]
        return parts, ((values - wide[0]).float() * wide[1].float()).T

    return pack


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Scales that no dtype rounds."""
    return torch.exp2(torch.ceil(torch.log2(values.float().clamp_min(1e-6))))


def compressed_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """W4A16 of compressed-tensors: signed values with an offset of 8 in words, scales for groups of 16."""
    groups = weight.float().unflatten(1, (-1, 16))
    scale = _power_of_two(groups.abs().amax(-1) / 7)
    values = (groups / scale[..., None]).round().clamp(-8, 7)
    parts = {
        "weight_packed": pack_words(values.flatten(1) + 8, 4, 1),
        "weight_scale": scale.to(weight.dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, (values * scale[..., None]).flatten(1)


def compressed_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 of compressed-tensors: a scale for each output."""
    scale = _power_of_two(weight.abs().amax(1, keepdim=True) / 448)
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale.to(weight.dtype)}, values.float() * scale


def row_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 of fbgemm: float32 scales for outputs."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def compressed_nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """NVFP4 of compressed-tensors: pairs of 4-bit floats, FP8 scales for groups of 16, a global divisor of these."""
    groups = weight.float().unflatten(1, (-1, 16))
    divisor = torch.tensor([2.0**10])
    scale = _power_of_two(groups.abs().amax(-1) / 6)
    codes = to_fp4(groups / scale[..., None]).flatten(1)
    values = FP4[(codes & 7).int()] * torch.where(codes > 7, -1, 1)
    parts = {
        "weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": (scale * divisor).to(torch.float8_e4m3fn),
        "weight_global_scale": divisor,
    }
    return parts, (values.unflatten(1, (-1, 16)) * scale[..., None]).flatten(1)


def compressed_settings(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
