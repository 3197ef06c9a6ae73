"""Tiny models with LoRA on every linear, a batch for each, and their gradients, for tests of compression."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import torch
import torch.utils.checkpoint
from transformers.pytorch_utils import Conv1D

from helpers.tiny_models import TINY, VOCAB, build

Gradients = dict[str, torch.Tensor]


def tiny_vit(**changes: Any) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return build("ViTConfig", "ViTForImageClassification", **shape, image_size=16, patch_size=4, **changes)


def tiny_siglip() -> Any:
    """Build a SigLIP classifier: the states of its layers lie in memory by channels, as its convolution leaves them."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**shape, "image_size": 16, "patch_size": 4, "vision_use_head": False}
    return build("SiglipConfig", "SiglipForImageClassification", vision_config=vision, text_config=shape)


def tiny_swin() -> Any:
    """Build a Swin classifier of two stages, whose widths differ."""
    shape = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "drop_path_rate": 0.0}
    return build("SwinConfig", "SwinForImageClassification", **shape, image_size=16, patch_size=2)


VISION = {"vit": tiny_vit, "siglip": tiny_siglip, "swin": tiny_swin}


def batch_for(model: Any, padded: bool = True) -> dict[str, torch.Tensor]:
    """Make two labeled rows of twelve tokens, the second with three of padding; or two images."""
    generator = torch.Generator().manual_seed(3)
    if "pixel_values" in model.main_input_name:
        images = torch.randn(2, 3, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, VOCAB, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def with_lora(model: Any, **settings: Any) -> Any:
    """Put random LoRA on all but the head, so both factors get gradients; return the model in training mode."""
    heads = {model.get_output_embeddings(), getattr(model, "classifier", None)}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module not in heads
    ]
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    fields = {"r": 4, "target_modules": linears, "init_lora_weights": False, "fan_in_fan_out": transposed, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(**fields)).train()


def adapted(name: str, **settings: Any) -> Any:
    """Build one of `TINY` or `VISION` with LoRA."""
    return with_lora({**TINY, **VISION}[name](), **settings)


def gradients(model: Any, batch: dict[str, torch.Tensor], seed: int = 7) -> Gradients:
    """Compute gradients of the trained parameters; dropout is seeded."""
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model(**batch).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Switch on transformers' own checkpointing of every layer, without its hook on the embeddings."""
    base = model.get_base_model()
    function = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    try:
        yield
    finally:
        base._set_gradient_checkpointing(enable=False)


def distance(left: Gradients, right: Gradients) -> float:
    """Compute the relative Frobenius distance of two gradients taken as vectors."""
    assert left.keys() == right.keys()
    difference = sum(float((left[name] - right[name]).double().square().sum()) for name in left)
    size = sum(float(tensor.double().square().sum()) for tensor in left.values())
    return float((difference / size) ** 0.5)


def equal(left: Gradients, right: Gradients) -> bool:
    """Say whether two gradients are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
