"""A directory of encoded images: what a pipeline's denoiser is called with, and the images' latents.

`encoded.json` is written last. Prompts and images each have a file of their own, so reading holds one row.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from onelayer.compiler.denoising.layout import Layout
from onelayer.compiler.denoising.noise import NoiseProcess
from onelayer.compiler.denoising.settings import Weighting
from onelayer.compiler.denoising.template import Form, Template
from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import DataSource, data_sets
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.digests import file_digest, sha256_json
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.compiler.storage.pipeline_directory import ENCODED_FILE
from onelayer.compiler.storage.safetensors_writer import tensor_entry, write_safetensors

FORMAT_VERSION = 1
LATENTS, PROMPTS, LAYOUT_FILE = "latents", "prompts", "layout.safetensors"


@dataclass(frozen=True)
class ImageRow:
    """One image: the number of its prompt, and whether it shows the class and not the subject."""

    file: str
    caption: str
    prompt: int
    is_class: bool


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of one pipeline, read from disk row by row.

    `base` names the denoiser's component and its digest, `scheduler` has the class and the config of the scheduler.
    """

    directory: Path
    base: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    form: Form
    rows: tuple[ImageRow, ...]
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> "EncodedImages":
        """Open a directory. Raises `InputError` if it holds no encoded images, or not all of them."""
        directory = Path(path)
        file = directory / ENCODED_FILE
        if not file.is_file():
            raise InputError(
                f"{path}: holds no encoded images; a denoiser reads what `onelayer encode MODEL --data IMAGES` writes"
            )
        document = read_json(file)
        try:
            if document["format_version"] != FORMAT_VERSION:
                raise InputError(f"{file}: format_version is {document['format_version']!r}; encode the images again")
            rows = tuple(ImageRow(**row) for row in document["rows"])
            form, digest = Form(**document["form"]), sha256_json(document)
            found = cls(directory, document["base"], document["scheduler"], form, rows, digest)
        except (KeyError, TypeError) as error:
            raise InputError(f"{file}: is damaged ({type(error).__name__}: {error}); encode the images again") from None
        for number, row in enumerate(rows):
            for part in (numbered(directory, LATENTS, number), numbered(directory, PROMPTS, row.prompt)):
                if not part.is_file():
                    raise InputError(f"{part}: is missing; encode the images again")
        return found

    def check_denoiser(self, digest: str, name: str) -> None:
        """Raise `InputError` unless the images were encoded for the denoiser with this digest."""
        if self.base["digest"] != digest:
            raise InputError(
                f"{self.directory}: was encoded for {self.base['model']} ({self.base['digest'][:12]}), not for {name} "
                f"({digest[:12]}); encode the images with this model"
            )

    @cached_property
    def answer(self) -> Layout:
        """Where the prediction lies in the denoiser's answer."""
        return Layout.stored(load_file(self.directory / LAYOUT_FILE), "answer")

    def latent(self, row: int) -> torch.Tensor:
        """Read the latent (1, ...) of an image."""
        return load_file(numbered(self.directory, LATENTS, row))["latent"]

    def template_of(self, prompt: int) -> Template:
        """Read the arguments for a prompt."""
        stored = load_file(numbered(self.directory, PROMPTS, prompt))
        return Template(self.form, [stored[f"leaf.{number}"] for number in range(len(stored))])

    def process(self, weighting: Weighting = "none") -> NoiseProcess:
        """Return the noise process of the pipeline's scheduler."""
        return NoiseProcess(self.scheduler["class_name"], self.scheduler["config"], weighting)

    def numbers(self, *, is_class: bool) -> list[int]:
        """Return the numbers of the rows of the subject, or of its class."""
        return [number for number, row in enumerate(self.rows) if row.is_class == is_class]


def encoded_images(data: DataSource, directory: Path) -> EncodedImages:
    """Open the one directory of encoded images that `data` names, for the denoiser in `directory`.

    Raises `InputError` for anything else, and for images that were encoded for another denoiser.
    """
    first, *more = data_sets(data)
    if more:
        raise InputError(f"{more[0]}: a denoiser reads one directory; encode all folders of images together")
    images = EncodedImages.open(first.path)
    images.check_denoiser(model_digest(directory), str(directory))
    return images


def numbered(directory: Path, kind: str, number: int) -> Path:
    """Return the path of a prompt's or an image's file."""
    return directory / kind / f"{number:06d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write some tensors to a file of their own, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    write_safetensors(
        path,
        [tensor_entry(name, tensor.clone(memory_format=torch.contiguous_format)) for name, tensor in tensors.items()],
    )


def finish_encoded(
    directory: Path, base: Mapping[str, Any], scheduler: Mapping[str, Any], form: Form, rows: list[ImageRow]
) -> None:
    """Write `encoded.json`, with the digests of all other files."""
    files = sorted(path for path in directory.rglob("*.safetensors"))
    document = {
        "format_version": FORMAT_VERSION,
        "kind": "encoded",
        "base": dict(base),
        "scheduler": json.loads(json.dumps(scheduler, default=str)),
        "form": asdict(form),
        "rows": [asdict(row) for row in rows],
        "files": {path.relative_to(directory).as_posix(): file_digest(path) for path in files},
    }
    write_json(directory / ENCODED_FILE, document)
