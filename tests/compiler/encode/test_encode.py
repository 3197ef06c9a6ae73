"""What a pipeline gives its denoiser, recorded without its weights, equals what the resident pipeline gives it."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers.hashes import tree_hashes
from helpers.image_folders import write_images
from helpers.tiny_pipelines import save_pipeline
from onelayer.compiler import encode_images
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.encode import command
from onelayer.compiler.encode.images import captioned_images, pixels
from onelayer.compiler.errors import InputError

SIZE = 32
PROMPTS = ("a photo of sks dog", "a red circle on the white field")


class Found(BaseException):
    """Ends a resident pipeline."""


def called_with(pipe: Any, name: str, prompt: str) -> dict[str, Any]:
    """The arguments of the resident pipeline's denoiser, and its time."""
    denoiser = getattr(pipe, name)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def forward(*args: Any, **kwargs: Any) -> None:
        raise Found({**dict(zip(names, args, strict=False)), **kwargs})

    denoiser.forward = forward
    with pytest.raises(Found) as caught:
        pipe(prompt, height=SIZE, width=SIZE, num_inference_steps=1, guidance_scale=1.0)
    del denoiser.forward
    arguments: dict[str, Any] = caught.value.args[0]
    return arguments


def decoded_from(pipe: Any, name: str, prompt: str, sample: torch.Tensor, answer: Any) -> torch.Tensor:
    """What the resident pipeline hands to its VAE if its last sample is `sample`."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return (sample.reshape(args[2].shape),)

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise Found(latent)

    denoiser = getattr(pipe, name)
    denoiser.forward = lambda *args, **kwargs: answer
    pipe.scheduler.step, pipe.vae.decode = step, decode
    with pytest.raises(Found) as caught:
        pipe(prompt, height=SIZE, width=SIZE, num_inference_steps=1, guidance_scale=1.0)
    latent: torch.Tensor = caught.value.args[0]
    return latent


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
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
        wanted = called_with(pipe, name, prompt)
        template = encoded.template_of(number)
        leaves = [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, torch.Tensor)]
        sample = leaves[encoded.form.sample]
        time = float(pipe.scheduler.timesteps[0])
        got = template.arguments(sample, time, torch.float32)
        for one, other in zip(tree_leaves(wanted), tree_leaves(got), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0)
            else:
                assert one == other
        image = captioned_images(folder, None, "", is_class=False)[number]
        latents = pipe.vae.encode(pixels(image, SIZE)).latent_dist
        latent = latents.sample(torch.Generator().manual_seed(number))
        with torch.no_grad():
            answer = getattr(pipe, name)(**wanted)
        seen = decoded_from(pipe, name, prompt, encoded.latent(number), answer)
        torch.testing.assert_close(seen, latent, rtol=0, atol=1e-5)
        del pipe.scheduler.step, pipe.vae.decode, getattr(pipe, name).forward


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
