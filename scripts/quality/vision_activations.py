"""Compressed activations on a ViT: accuracy, bytes stored for backward and step time, next to plain LoRA.

python -m scripts.quality.vision_activations [--base-steps N] [--steps N] [--seeds N]

A small ViT learns six drawn shapes on the spot. LoRA then learns them in another style (outlines on a noisy ground),
with activations stored whole, recomputed by transformers' checkpointing, and compressed (LoRAct, arXiv 2509.23472, and
its form with a residual). Accuracy is on 600 held-out pictures of the new style. Step times are ratios to plain LoRA,
measured in turns in one run.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import peft
import torch
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

from onelayer.runtime import compress_activations
from onelayer.runtime.activations.compression import ActivationCompression
from onelayer.runtime.activations.figures import SavedBytes

SIDE, BATCH, HELD_OUT = 48, 32, 600
RATE, LORA_RATE, RANK, WARM_UP_STEPS = 1e-3, 3e-3, 8, 50
# Corners of shapes on a grid of 3 by 3: triangle, square, plus, two bars; the sixth shape is a disc.
CORNERS: list[list[tuple[float, float]]] = [
    [(0, 3), (1.5, 0), (3, 3)],
    [(0, 0), (3, 0), (3, 3), (0, 3)],
    [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
    [(0, 1), (3, 1), (3, 2), (0, 2)],
    [(1, 0), (2, 0), (2, 3), (1, 3)],
]
CLASSES = len(CORNERS) + 1
# Where and with which share of the width activations are compressed, and the bits of the residual.
COMPRESSED: dict[str, dict[str, Any]] = {
    "published, layer, 1/8": {"where": "layer", "rank": 0.125, "residual_bits": 0},
    "published, sublayer, 1/8": {"where": "sublayer", "rank": 0.125, "residual_bits": 0},
    "layer, 1/8": {"where": "layer", "rank": 0.125},
    "sublayer, 1/8": {"where": "sublayer", "rank": 0.125},
    "sublayer, 1/2": {"where": "sublayer", "rank": 0.5},
}
WAYS = ("stored whole", "checkpointing", *COMPRESSED)


def picture(label: int, outlined: bool, numbers: np.random.Generator) -> np.ndarray:
    """Draw one shape at a random place: (3, SIDE, SIDE) in -1 to 1."""
    ground = int(numbers.integers(0, 90)) if outlined else int(numbers.integers(170, 255))
    image = Image.new("L", (SIDE, SIDE), ground)
    size = int(numbers.integers(SIDE // 2, 3 * SIDE // 4))
    left, top = numbers.integers(2, SIDE - 1 - size, 2).tolist()
    tone = 255 - ground
    style = {"outline": tone, "width": 2} if outlined else {"fill": tone}
    draw = ImageDraw.Draw(image)
    if label == len(CORNERS):
        draw.ellipse((left, top, left + size, top + size), **style)
    else:
        draw.polygon([(left + x * size / 3, top + y * size / 3) for x, y in CORNERS[label]], **style)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    noise = numbers.normal(0, 0.25 if outlined else 0.05, pixels.shape)
    return np.repeat((pixels + noise)[None], 3, axis=0).astype(np.float32)


def batch(count: int, outlined: bool, numbers: np.random.Generator) -> dict[str, torch.Tensor]:
    """Draw pictures of random classes."""
    labels = numbers.integers(0, CLASSES, count)
    pixels = np.stack([picture(int(label), outlined, numbers) for label in labels])
    return {"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}


def learn(model: Any, steps: int, rate: float, outlined: bool, seed: int) -> None:
    """Train what is trainable for some steps: the rate rises, then falls by a cosine."""
    numbers = np.random.default_rng(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        model(**batch(BATCH, outlined, numbers)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: Any, outlined: bool) -> float:
    """Return the share of held-out pictures whose class has the highest logit."""
    held_out = batch(HELD_OUT, outlined, np.random.default_rng(10_000))
    model.eval()
    return float((model(**held_out).logits.argmax(-1) == held_out["labels"]).float().mean())


def adapted(base: dict[str, torch.Tensor], config: ViTConfig, seed: int) -> Any:
    """Put fresh LoRA on every linear of the base, and train its head."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(config)
    model.load_state_dict(base)
    targets = [name for name, module in model.vit.named_modules() if isinstance(module, torch.nn.Linear)]
    lora = peft.LoraConfig(r=RANK, target_modules=[f"vit.{name}" for name in targets], modules_to_save=["classifier"])
    return peft.get_peft_model(model, lora)


@contextmanager
def way_of(model: Any, way: str) -> Iterator[ActivationCompression | None]:
    """Store the activations of a model in one of `WAYS`."""
    base = model.get_base_model()
    compression = compress_activations(model, **COMPRESSED[way]) if way in COMPRESSED else None
    if way == "checkpointing":
        recompute = partial(checkpoint, use_reentrant=False)
        base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)
    try:
        yield compression
    finally:
        if compression is not None:
            compression.remove()
        elif way == "checkpointing":
            base._set_gradient_checkpointing(enable=False)


def measure_step(model: Any, compression: ActivationCompression | None) -> tuple[int, float]:
    """Return the bytes that one step keeps for backward, and the seconds of a second step."""
    inputs = batch(BATCH, True, np.random.default_rng(0))
    model.train()
    with SavedBytes(model) as saved, nullcontext() if compression is None else compression.measure(False) as figures:
        loss = model(**inputs).loss
    loss.backward()
    started = time.perf_counter()
    model(**inputs).loss.backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return saved.total(figures), seconds


def main() -> int:
    """Print one row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--base-steps", 700), ("--steps", 200), ("--seeds", 3)):
        parser.add_argument(name, type=int, default=default)
    asked = parser.parse_args()
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes: dict[str, Any] = {**shape, "image_size": SIDE, "patch_size": 8, "num_labels": CLASSES}
    config = ViTConfig(**sizes)
    base = ViTForImageClassification(config)
    learn(base, asked.base_steps, RATE, outlined=False, seed=0)
    found = f"{accuracy(base, outlined=False):.3f} of its own style and {accuracy(base, outlined=True):.3f} of the new"
    print(f"the base recognizes {found}\n")
    weights = base.state_dict()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    stored: dict[str, int] = {}
    for seed in range(asked.seeds):
        for way in WAYS:  # in turns, so that a busy machine slows all alike
            model = adapted(weights, config, seed)
            with way_of(model, way) as compression:
                stored[way], step_seconds = measure_step(model, compression)
                seconds[way].append(step_seconds)
                learn(model, asked.steps, LORA_RATE, outlined=True, seed=seed + 1)
            scores[way].append(accuracy(model, outlined=True))
            print(f"seed {seed}, {way}: {scores[way][-1]:.3f}", file=sys.stderr, flush=True)
    print("| activations | accuracy | bytes for backward | step time |\n|---|---|---|---|")
    plain = statistics.median(seconds[WAYS[0]])
    for way in WAYS:
        hits = ", ".join(f"{score:.3f}" for score in scores[way])
        print(f"| {way} | {hits} | {stored[way]:,} | {statistics.median(seconds[way]) / plain:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
