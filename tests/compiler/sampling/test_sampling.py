"""Sample pictures of streamed pipelines equal those that diffusers draws with everything in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.hashes import tree_hashes
from helpers.peft_adapters import quiet_peft
from onelayer.compiler import sample_pictures
from onelayer.compiler.errors import InputError
from onelayer.compiler.sampling import sampler
from onelayer.compiler.storage.files import read_json, write_json
from scripts.sweep.encoded_pipelines import EncodedPipeline
from scripts.sweep.pipelines import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a photo of sks dog", "a red circle on the white field"]
HOW: dict[str, Any] = {"steps": 2, "resolution": 32, "seed": 3}


def drawn_in_memory(pipe: Any, prompt: str) -> np.ndarray:
    """Draw a picture with diffusers alone."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(HOW["seed"])
    frames = {"num_frames": 1} if "Wan" in type(pipe).__name__ else {}
    found = pipe(prompt, height=32, width=32, num_inference_steps=2, generator=generator, return_dict=False, **frames)
    picture = found[0][0]
    return np.asarray(picture, np.float32)


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_pictures_equal_those_of_the_resident_pipeline(family: str, tmp_path: Path) -> None:
    pipe = save_pipeline(family, tmp_path / "pipe")
    found = sample_pictures(tmp_path / "pipe", PROMPTS, tmp_path / "out", **HOW)
    assert [(picture.file, picture.prompt) for picture in found.pictures] == [
        ("0.png", PROMPTS[0]),
        ("1.png", PROMPTS[1]),
    ]
    for picture in found.pictures:
        ours = np.asarray(Image.open(tmp_path / "out" / picture.file), np.float32)
        assert ours.shape == (32, 32, 3)
        assert np.abs(ours - drawn_in_memory(pipe, picture.prompt)).max() <= 1
        assert ours.std() > 5
    report = found.report
    assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes
