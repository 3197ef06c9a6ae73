"""Tiny pipelines with encoded images of a subject and of its class."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onelayer.compiler import encode_images
from onelayer.compiler.denoising.batches import NoisyImages
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.storage.pipeline_directory import denoiser_directory
from scripts.sweep.pipelines import save_pipeline

SIZE = 32
SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"


@dataclass(frozen=True)
class EncodedPipeline:
    """A pipeline on disk and in memory, its denoiser's component, and its encoded images."""

    pipeline: Path
    denoiser: Path
    images: Path
    pipe: Any

    def load(self, directory: Path | None = None) -> Any:
        """Load the denoiser, or another directory of its class, with diffusers itself."""
        kind = type(getattr(self.pipe, self.denoiser.name))
        return kind.from_pretrained(str(directory or self.denoiser)).eval()

    @property
    def photos(self) -> Path:
        """The folder of the subject's images."""
        return self.pipeline.parent / "photos"

    @property
    def encoded(self) -> EncodedImages:
        """The encoded images: three of the subject, then two of the class."""
        return EncodedImages.open(self.images)

    def noisy(self) -> NoisyImages:
        """Return the images with noise."""
        return NoisyImages(self.encoded, torch.float32)


def write_images(folder: Path, count: int = 2, size: tuple[int, int] = (40, 32), seed: int = 0) -> Path:
    """Write `count` images of a (width, height), each of its own noise."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def encoded_pipeline(family: str, root: Path, **shape: Any) -> EncodedPipeline:
    """Make a tiny pipeline below `root` and encode images for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = save_pipeline(family, root / "pipe", **shape)
        photos, others = write_images(root / "photos", 3), write_images(root / "class", 2, seed=9)
        prompts: dict[str, Any] = {"instance_prompt": SUBJECT, "class_prompt": CLASS}
        encode_images(root / "pipe", photos, root / "images", class_data=others, resolution=SIZE, **prompts)
    return EncodedPipeline(root / "pipe", denoiser_directory(root / "pipe"), root / "images", pipe)
