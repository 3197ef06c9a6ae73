"""A single GGUF file as a model directory: its configuration and tokenizer, written once, next to a link to the file.

Held in `$ONELAYER_HOME/gguf`. transformers reads both from the file; the weights stay where they are.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import atomic_directory, onelayer_home
from onelayer.compiler.storage.gguf_format import SUFFIX, read_gguf_header
from onelayer.compiler.storage.model_config import write_model_config

# Changes when directories are written in another way.
LAYOUT = 1


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name."""
    return path.suffix == SUFFIX and path.is_file()


def gguf_directory(file: Path) -> Path:
    """Return a model directory for a GGUF file, made if it is missing.

    Raises `InputError` naming the file if its header is damaged, or if transformers does not read its architecture.
    """
    from filelock import FileLock

    tensors, metadata = read_gguf_header(file)
    real = file.resolve()
    rows = [[name, info.dtype, list(info.shape), info.start] for name, info in tensors.items()]
    key = sha256_json({"layout": LAYOUT, "file": str(real), "metadata": metadata, "tensors": rows})
    directory = onelayer_home() / "gguf" / key[:32]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not directory.exists():
            with atomic_directory(directory) as partial:
                _write(real, partial, "F32" if _most(tensors) == "F32" else "BF16")
                os.symlink(real, partial / file.name)
    return directory


def _most(tensors: dict[str, Any]) -> str:
    """Return the type of most of the bytes."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    return max(sizes, key=lambda name: sizes[name], default="")


def _write(file: Path, directory: Path, dtype: str) -> None:
    """Write config.json and the tokenizer's files as transformers reads them from the file."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(**source)
            transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(str(directory))
    except ImportError as error:
        if "gguf" not in str(error).lower():
            raise
        raise InputError(f"{file}: reading GGUF needs the package gguf, which is missing: pip install gguf") from None
    except Exception as error:  # whatever its readers do with values that they do not check
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{file}: transformers cannot read it ({reason}); give the model's safetensors") from None
    document = config.to_dict()
    for name in ("quantization_config", "transformers_version", "_name_or_path"):
        document.pop(name, None)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not document.get("architectures") and architecture is None:
        raise InputError(f"{file}: {config.model_type!r} is no language model; give the model's safetensors")
    document["architectures"] = document.get("architectures") or [architecture]
    document["dtype"] = {"F32": "float32", "BF16": "bfloat16"}[dtype]
    write_model_config(directory, document)
