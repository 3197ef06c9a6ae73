"""Sample pictures of streamed pipelines equal those that diffusers draws with everything in memory."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.hashes import tree_hashes
from onelayer.compiler import polish_adapter, sample_pictures
from onelayer.compiler.errors import InputError
from onelayer.compiler.sampling.sampler import _Streams
from onelayer.compiler.storage.files import read_json, write_json
from scripts.sweep.diffusion_inputs import picture_difference
from scripts.sweep.encoded_pipelines import EncodedPipeline
from scripts.sweep.pipelines import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a photo of sks dog", "a red circle on the white field"]
HOW: dict[str, Any] = {"steps": 2, "resolution": 32, "seed": 3}


@pytest.fixture(scope="module")
def adapter(flux: EncodedPipeline) -> Path:
    output = flux.pipeline.parent / "one-step"
    how: dict[str, Any] = {"lora_rank": 4, "steps": 1, "batch_size": 2, "learning_rate": 3e-2}
    polish_adapter(None, model=flux.pipeline, data=flux.images, output=output, **how)
    return output


def test_pictures_with_an_adapter_equal_those_of_diffusers(
    flux: EncodedPipeline, adapter: Path, tmp_path: Path
) -> None:
    found = sample_pictures(flux.pipeline, PROMPTS, tmp_path / "out", adapter=adapter, **HOW)
    assert [(picture.file, picture.prompt) for picture in found.pictures] == list(
        zip(("0.png", "1.png"), PROMPTS, strict=True)
    )
    pipe = type(flux.pipe).from_pretrained(str(flux.pipeline))
    bare = picture_difference(pipe, tmp_path / "out" / "0.png", PROMPTS[0], HOW)
    pipe.load_lora_weights(str(adapter), weight_name="pytorch_lora_weights.safetensors")
    differences = [picture_difference(pipe, tmp_path / "out" / f"{n}.png", PROMPTS[n], HOW) for n in range(2)]
    assert max(differences) <= 1 < bare
    assert np.asarray(Image.open(tmp_path / "out" / "1.png"), np.float32).std() > 2
    report = found.report
    assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_guided_pipelines_draw_as_they_do_in_memory(family: str, tmp_path: Path) -> None:
    pipe = save_pipeline(family, tmp_path / "pipe")
    with pytest.raises(InputError, match=f"{type(pipe).__name__} draws no picture of 'a photo of sks dog' .*37"):
        sample_pictures(tmp_path / "pipe", PROMPTS, tmp_path / "out", resolution=37)
    sample_pictures(tmp_path / "pipe", PROMPTS, tmp_path / "out", **HOW)
    differences = [picture_difference(pipe, tmp_path / "out" / f"{n}.png", PROMPTS[n], HOW) for n in range(2)]
    assert max(differences) <= 1


def test_an_interrupted_run_keeps_its_denoising_steps(
    flux: EncodedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_pictures(flux.pipeline, PROMPTS, tmp_path / "calm", **HOW)
    plain, parts = _Streams._streamed, list[str]()

    def failing(self: Any, part: str, calls: Any) -> list[Any]:
        parts.append(part)
        if parts.count("transformer") == 2 and len(parts) == 4:
            raise KeyboardInterrupt
        return plain(self, part, calls)

    monkeypatch.setattr(_Streams, "_streamed", failing)
    with pytest.raises(KeyboardInterrupt):
        sample_pictures(flux.pipeline, PROMPTS, tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()
    sample_pictures(flux.pipeline, PROMPTS, tmp_path / "out", **HOW)
    encoders, steps = ["text_encoder", "text_encoder_2"], ["transformer", "transformer"]
    assert parts == [*encoders, *steps, *encoders, "transformer", "vae", "vae"]
    assert tree_hashes(tmp_path / "out") == tree_hashes(tmp_path / "calm")


def without_encoders(pipe: Path) -> None:
    """Leave the components of an SDXL pipeline that it may lack."""
    shutil.rmtree(pipe)
    save_pipeline("sdxl", pipe)
    index = read_json(pipe / "model_index.json")
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    write_json(pipe / "model_index.json", {**index, **{name: [None, None] for name in names}})


def with_numbers_that_overflow(pipe: Path) -> None:
    from safetensors.torch import load_file, save_file

    [file] = (pipe / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_out.weight"] = torch.full_like(tensors["decoder.conv_out.weight"], 3e38)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        (without_encoders, {}, "has no text encoder, which sample pictures need"),
        (with_numbers_that_overflow, {}, "vae: its answer for a sample picture is not finite in float32"),
        (None, {"prompt": " "}, "--prompt : must say what to draw"),
        (None, {"prompt": []}, "--prompt : must say what to draw"),
        (None, {"steps": 0}, "--steps 0: must be at least 1"),
        (None, {"adapter": "pipe"}, "pipe"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    change: Any, how: dict[str, Any], message: str, flux: EncodedPipeline, tmp_path: Path
) -> None:
    shutil.copytree(flux.pipeline, tmp_path / "pipe")
    if change is not None:
        change(tmp_path / "pipe")
    if "adapter" in how:
        how = {"adapter": tmp_path / how["adapter"]}
    asked = {"prompt": PROMPTS[0], **HOW, **how}
    with pytest.raises(InputError) as caught:
        sample_pictures(tmp_path / "pipe", output=tmp_path / "out", **asked)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
