"""Encoded images of tiny pipelines, made once per test session directory."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.image_folders import write_images
from onelayer.compiler import encode_images
from onelayer.compiler.denoising.batches import NoisyImages
from onelayer.compiler.denoising.encoded import EncodedImages
from scripts.sweep.pipelines import save_pipeline

SIZE = 32
SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"


@dataclass(frozen=True)
class EncodedPipeline:
    """A pipeline, its denoiser's component, and three images of a subject with two of its class."""

    pipeline: Path
    denoiser: Path
    images: Path
    pipe: Any

    def load(self, directory: Path | None = None) -> Any:
        """Load the denoiser, or another directory of its class, with diffusers itself."""
        kind = type(getattr(self.pipe, self.denoiser.name))
        return kind.from_pretrained(str(directory or self.denoiser)).eval()

    def noisy(self) -> NoisyImages:
        """Return the images with noise."""
        return NoisyImages(EncodedImages.open(self.images), torch.float32)


def encoded_pipeline(family: str, root: Path) -> EncodedPipeline:
    """Make a tiny pipeline below `root` and encode images for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = save_pipeline(family, root / "pipe")
        photos, others = write_images(root / "photos", 3), write_images(root / "class", 2, seed=9)
        prompts: dict[str, Any] = {"instance_prompt": SUBJECT, "class_prompt": CLASS}
        encode_images(root / "pipe", photos, root / "images", class_data=others, resolution=SIZE, **prompts)
    name = "unet" if family == "sdxl" else "transformer"
    return EncodedPipeline(root / "pipe", root / "pipe" / name, root / "images", pipe)
