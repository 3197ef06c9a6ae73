"""The config.json of a model directory: read as a document, and written as transformers reads it. Torch-free."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json, write_json

CONFIG_FILE = "config.json"


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read the config.json of a model directory. Raises `InputError` naming the file.

    Numbers may be infinite there: transformers writes the limits of Mamba 2's time steps as a bare `Infinity`.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory}: has no config.json; give a transformers model directory")
    document = read_json(path, finite=False)
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a table of fields ({str(document)[:40]}); restore the file")
    for field in ("quantization_config", "text_config"):
        if not isinstance(document.get(field), dict | None):
            raise InputError(f"{path}: field {field}: is not a table of fields; restore the file")
    names = document.get("architectures")
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise InputError(f"{path}: field architectures: is not a list of names; restore the file")
    return document


def is_diffusers_config(document: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a diffusers model: such a model is named by its class, and has no type."""
    return "_class_name" in document and "model_type" not in document


def write_model_config(directory: Path, document: dict[str, Any]) -> None:
    """Write a config.json that is JSON: numbers that are not finite as transformers (4.57 and later) marks them."""
    write_json(directory / CONFIG_FILE, marked(document))


def marked(value: Any) -> Any:
    """Return a document with numbers that are not finite as transformers marks them."""
    if isinstance(value, dict):
        return {name: marked(item) for name, item in value.items()}
    if isinstance(value, list):
        return [marked(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return {"__float__": "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    return value
