"""A diffusers pipeline on disk: which of its components is the denoiser. Torch-free."""

from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json

INDEX_FILE = "model_index.json"
# The file of encoded images, the data of a pipeline's denoiser.
ENCODED_FILE = "encoded.json"
# The names that diffusers itself gives the denoiser in every pipeline.
DENOISERS = ("transformer", "unet")


def is_pipeline(directory: Path) -> bool:
    """Whether a directory holds a pipeline."""
    return (directory / INDEX_FILE).is_file()


def read_pipeline_index(directory: Path) -> dict[str, Any]:
    """Read the index of a pipeline. Raises `InputError` naming the file if it names no class."""
    file = directory / INDEX_FILE
    if not file.is_file():
        raise InputError(f"{directory}: has no {INDEX_FILE}; give the directory of a diffusers pipeline")
    document = read_json(file)
    if not isinstance(document, dict) or not isinstance(document.get("_class_name"), str):
        raise InputError(f"{file}: field _class_name: names no pipeline; restore the file")
    return document


def components_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of every component that a pipeline has, by name."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }


def denoiser_directory(directory: Path) -> Path:
    """Return the directory of a pipeline's denoiser. Raises `InputError` if it has none, or two."""
    found = components_of(read_pipeline_index(directory))
    names = [name for name in found if name.rstrip("_0123456789") in DENOISERS and found[name][0] == "diffusers"]
    file = directory / INDEX_FILE
    if len(names) > 1:
        raise InputError(
            f"{file}: has {len(names)} denoisers, {', '.join(names)}, which take turns; give the directory of one"
        )
    if not names:
        raise InputError(f"{file}: has no denoiser ({' or '.join(DENOISERS)}) of diffusers; give another pipeline")
    component = directory / names[0]
    if not component.is_dir():
        raise InputError(f"{component}: is missing, {INDEX_FILE} names it; download the pipeline again")
    return component


def weights_name(class_name: str) -> str:
    """Return the name under which pipelines load adapters of a denoiser's class."""
    return DENOISERS["UNet" in class_name]
