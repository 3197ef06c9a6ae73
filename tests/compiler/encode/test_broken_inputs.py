"""Broken pipelines and folders of images: one clear line each, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onelayer.compiler import encode_images
from onelayer.compiler.errors import InputError
from scripts.sweep.encoded_pipelines import SIZE, SUBJECT, EncodedPipeline, write_images

pytestmark = pytest.mark.filterwarnings("ignore")
Break = Callable[[Path], dict[str, Any] | None]


def rows(*entries: object) -> Break:
    """Write `metadata.jsonl` with these rows."""

    def write(root: Path) -> dict[str, Any]:
        text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
        (root / "photos/metadata.jsonl").write_text(text)
        return {"instance_prompt": None}

    return write


def written(name: str, content: str, **how: Any) -> Break:
    """Write a file of the pipeline or of the photos."""

    def write(root: Path) -> dict[str, Any]:
        (root / name).write_text(content)
        return how

    return write


def edited(name: str, **fields: Any) -> Break:
    """Change fields of a JSON file of the pipeline; None leaves one out."""

    def write(root: Path) -> None:
        document = json.loads((root / name).read_text()) | fields
        (root / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))

    return write


def both(*breaks: Break) -> Break:
    """Break the pipeline in several places."""

    def write(root: Path) -> None:
        for one in breaks:
            one(root)

    return write


def without(name: str) -> Break:
    """Remove a file or a folder."""

    def remove(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def moved(name: str, to: str) -> Break:
    """Put a folder of the pipeline in the place of another one."""

    def replace(root: Path) -> None:
        shutil.rmtree(root / to)
        shutil.copytree(root / name, root / to)

    return replace


def empty(root: Path) -> None:
    """Leave no photo."""
    for path in (root / "photos").iterdir():
        path.unlink()


def given(**how: Any) -> Break:
    """Change nothing, and give other arguments. Paths are relative to the test's folder."""
    return lambda root: {name: root / value if isinstance(value, Path) else value for name, value in how.items()}


def single_file(root: Path) -> dict[str, Any]:
    """Give the weights of a denoiser alone, as model hubs offer them."""
    weights = root / "pipe/transformer/diffusion_pytorch_model.safetensors"
    return {"model": Path(shutil.copy(weights, root / "flux1-dev.safetensors"))}


def gguf(root: Path) -> dict[str, Any]:
    """Give a GGUF file."""
    (root / "flux1-dev-Q4_K.gguf").write_bytes(b"GGUF" + bytes(60))
    return {"model": root / "flux1-dev-Q4_K.gguf"}


INDEX, DENOISER = "pipe/model_index.json", "pipe/transformer"
CASES: dict[str, tuple[Break, str]] = {
    "no captions": (given(instance_prompt=None), r"0\.png: has no caption; write metadata.jsonl"),
    "an empty caption": (written("photos/0.txt", " \n", instance_prompt=None), "has no caption"),
    "a row without a name": (rows({"text": "a dog"}), "metadata.jsonl:1: field file_name"),
    "a caption that is no text": (rows({"file_name": "0.png", "text": 3}), "field text: is no text"),
    "a row that is no JSON": (rows('{"file_name": "0.png"'), "metadata.jsonl"),
    "a name without an image": (rows({"file_name": "9.png", "text": "a dog"}), r"9\.png"),
    "an image elsewhere": (rows({"file_name": "../pipe/model_index.json", "text": "a dog"}), "model_index.json"),
    "no images": (empty, "photos: holds no images"),
    "a folder that is a file": (given(data=Path(INDEX)), "is a file; give the folder"),
    "no folder": (given(data=Path("nothing")), "nothing: no such directory"),
    "a broken image": (written("photos/0.png", "no picture"), r"0\.png"),
    "images that are too small": (given(resolution=512), "40 x 32 pixels, too few for --resolution 512"),
    "a prompt of a class without images": (given(class_prompt="a dog"), "--class-prompt a dog: there are no class"),
    "no such pipeline": (given(model=Path("nowhere")), "nowhere: no such directory"),
    "a single-file checkpoint": (single_file, "is a single-file checkpoint; give a directory"),
    "a GGUF file": (gguf, r"\.gguf: .*pipeline"),
    "a denoiser alone": (given(model=Path(DENOISER)), "has no model_index.json; give the directory of a diffusers"),
    "no class of the pipeline": (edited(INDEX, _class_name=None), "field _class_name: names no pipeline"),
    "an unknown pipeline": (edited(INDEX, _class_name="DreamPipeline"), "'DreamPipeline' is not a pipeline of"),
    "a model as pipeline": (edited(INDEX, _class_name="AutoencoderKL"), "'AutoencoderKL' is not a pipeline of"),
    "no VAE in the index": (edited(INDEX, vae=None), "has no vae, which encoding needs"),
    "no denoiser": (edited(INDEX, transformer=None), "has no denoiser"),
    "two denoisers": (edited(INDEX, transformer_2=["diffusers", "FluxTransformer2DModel"]), "has 2 denoisers"),
    "a missing text encoder": (without("pipe/text_encoder_2"), "text_encoder_2: is missing"),
    "a missing denoiser": (without(DENOISER), "transformer: is missing"),
    "missing weights of the denoiser": (without(f"{DENOISER}/diffusion_pytorch_model.safetensors"), "transformer: "),
    "missing weights of the VAE": (without("pipe/vae/diffusion_pytorch_model.safetensors"), "vae: "),
    "a missing config": (without("pipe/vae/config.json"), "vae: has no config.json"),
    "a VAE that is a denoiser": (moved(DENOISER, "pipe/vae"), "FluxTransformer2DModel encodes no images"),
    "a wrong class": (edited(f"{DENOISER}/config.json", _class_name="DreamModel"), "'DreamModel' is not a model of"),
    "a damaged tokenizer": (written("pipe/tokenizer/tokenizer.json", "{"), "the pipeline cannot be opened"),
    "an unknown prediction": (
        both(
            edited("pipe/model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
            edited("pipe/scheduler/scheduler_config.json", _class_name="DDIMScheduler", prediction_type="dreams"),
        ),
        "prediction_type 'dreams' is unknown",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(case: str, flux: EncodedPipeline, tmp_path: Path) -> None:
    broken, message = CASES[case]
    shutil.copytree(flux.pipeline, tmp_path / "pipe")
    write_images(tmp_path / "photos")
    asked: dict[str, Any] = {"model": tmp_path / "pipe", "data": tmp_path / "photos", "instance_prompt": SUBJECT}
    asked |= {"output": tmp_path / "out", "resolution": SIZE} | (broken(tmp_path) or {})
    with pytest.raises(InputError, match=message) as caught:
        encode_images(**asked)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
