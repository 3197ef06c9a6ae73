"""The files beside a model's weights: one directory in, the same files in another out, byte for byte."""

import shutil
from pathlib import Path

# Weights, in whatever format: the originals of what is being rewritten, never to stand beside the result.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer, templates, licence and cards; hidden files (a repository's history) stay behind."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if path.is_dir():
            (target / path.name).mkdir(exist_ok=True)
            copy_companions(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
