"""What a pipeline gives its denoiser, recorded without its weights, equals what the resident pipeline gives it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hashes import tree_hashes
from onelayer.compiler import encode_images
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.encode import command
from onelayer.compiler.encode.images import captioned_images, pixels
from onelayer.compiler.errors import InputError
from scripts.sweep.diffusion_inputs import latent_difference, recorded_difference
from scripts.sweep.encoded_pipelines import write_images
from scripts.sweep.pipelines import save_pipeline

SIZE = 32
PROMPTS = ("a photo of sks dog", "a red circle on the white field")


@pytest.mark.parametrize("family", ["flux", "sdxl", "zimage"])
@pytest.mark.filterwarnings("ignore")
def test_recorded_inputs_equal_those_of_the_resident_pipeline(family: str, tmp_path: Path) -> None:
    pipe = save_pipeline(family, tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    folder = write_images(tmp_path / "photos")
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(PROMPTS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = encode_images(tmp_path / "pipe", folder, tmp_path / "out", resolution=SIZE)
    assert (result.images, result.prompts, result.class_images) == (2, 2, 0)
    promised = result.report.largest_unit_bytes + result.report.workspace_bytes
    assert result.report.peak_device_bytes <= promised
    encoded, name = EncodedImages.open(tmp_path / "out"), "unet" if family == "sdxl" else "transformer"
    for number, prompt in enumerate(PROMPTS):
        assert recorded_difference(pipe, name, encoded, prompt, number, SIZE) == 0
        image = captioned_images(folder, None, "", is_class=False)[number]
        assert latent_difference(pipe, name, encoded, prompt, number, pixels(image, SIZE), SIZE) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_encoding_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pipeline("flux", tmp_path / "pipe")
    photos, more = write_images(tmp_path / "photos", 3), write_images(tmp_path / "class", 1, seed=5)
    how: dict[str, Any] = {"resolution": SIZE, "instance_prompt": PROMPTS[0], "class_prompt": PROMPTS[1]}
    result = encode_images(tmp_path / "pipe", photos, tmp_path / "whole", class_data=more, **how)
    assert result.class_images == 1
    encoded = EncodedImages.open(tmp_path / "whole")
    assert (encoded.numbers(is_class=True), encoded.numbers(is_class=False)) == ([3], [0, 1, 2])
    plain, made = command._Encoding._latent, list[int]()
    [weights] = (tmp_path / "pipe/vae").glob("*.safetensors")

    def failing(self: Any, image: Any, number: int, layout: Any) -> torch.Tensor:
        made.append(number)
        if made == [0, 1]:
            raise KeyboardInterrupt
        if made == [0, 1, 1]:  # the VAE is replaced while it is used
            shutil.copyfile(weights, tmp_path / "other")
            (tmp_path / "other").replace(weights)
        return plain(self, image, number, layout)

    monkeypatch.setattr(command._Encoding, "_latent", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_images(tmp_path / "pipe", photos, tmp_path / "again", class_data=more, **how)
    with pytest.raises(InputError, match="changed while it was read"):
        encode_images(tmp_path / "pipe", photos, tmp_path / "again", class_data=more, **how)
    assert not (tmp_path / "again").exists()
    encode_images(tmp_path / "pipe", photos, tmp_path / "again", class_data=more, **how)
    assert made == [0, 1, 1, 2, 3]
    assert tree_hashes(tmp_path / "again") == tree_hashes(tmp_path / "whole")
