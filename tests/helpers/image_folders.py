"""Small folders of noise images for diffusion tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int = 2, size: tuple[int, int] = (40, 32), seed: int = 0) -> Path:
    """Write `count` images of a (width, height), each of its own noise."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
