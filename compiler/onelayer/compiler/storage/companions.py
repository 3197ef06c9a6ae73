"""What belongs beside a model's weights: a list of known files, which is all that is ever copied with them.

Adapters, caches, code and other files that happen to lie in a model's directory are no part of the model.
"""

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.compiler.storage.model_config import marked

_KNOWN = (
    # The model and how it generates.
    "config.json",
    "generation_config.json",
    # Tokenizers.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-*.json",
    "*_vocab.json",
    "merges.txt",
    "encoder.json",
    "normalizer.json",
    "emoji.json",
    "bpe.codes",
    "dict.txt",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    # Processors of images, video and sound.
    "*processor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    # Sentence encoders.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
)
_DOCUMENTS = re.compile(r"(?i:readme|licen[cs]e|notice|copying|use_policy)[\w-]*(\.(md|txt|rst))?")
# Configurations that may name code in files next to them, or in other repositories.
_WITH_CODE = "*config.json"


def companions(directory: Path) -> list[Path]:
    """List the known files beside the weights of a model. Raises `InputError` for one that is no regular file.

    A link that leads nowhere is listed too.
    """
    found = []
    for path in _candidates(directory):
        name = path.relative_to(directory).as_posix()
        if not _is_known(name) or path.is_dir():
            continue
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file; restore or remove it")
        found.append(path)
    return found


def check_companions(directory: Path) -> list[Path]:
    """List the same files where all of them can be copied. Raises `InputError` for a link that leads nowhere or out.

    Links of the Hub's cache lead to its own blobs.
    """
    inside = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        inside.append(directory.resolve().parent.parent / "blobs")
    found = companions(directory)
    for path in found:
        real = path.resolve()
        if not real.is_file():
            raise InputError(f"{path}: is a link that leads nowhere; restore the file or remove the link")
        if not any(real.is_relative_to(folder) for folder in inside):
            raise InputError(f"{path}: is a link to {real}, outside the directory; put the file itself there")
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy the known files of a model, without pointers to code, which is never copied.

    Raises `InputError` like `check_companions`, which is called before work for the same reason.
    """
    for path in check_companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        document = read_json(path, finite=False) if fnmatchcase(path.name, _WITH_CODE) else None
        if isinstance(document, dict) and "auto_map" in document:
            write_json(copy, marked({name: value for name, value in document.items() if name != "auto_map"}))
        else:
            shutil.copyfile(path, copy)


def _is_known(name: str) -> bool:
    alike = (known for known in _KNOWN if known.count("/") == name.count("/"))
    return name[0] != "." and (any(fnmatchcase(name, known) for known in alike) or bool(_DOCUMENTS.fullmatch(name)))


def _candidates(directory: Path) -> Iterator[Path]:
    """List the entries of a directory and of the folders in it that may hold known files, in order of their names."""
    folders = {known.rpartition("/")[0] for known in _KNOWN if "/" in known}
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir() and any(fnmatchcase(path.name, folder) for folder in folders):
            yield from sorted(path.iterdir())
