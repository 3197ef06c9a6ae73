"""A model or data set of the user's in, the digest of what it holds now out; nothing is downloaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.digests import file_digest, sha256_json

# Files beside the weights that decide which tokens a text becomes.
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|processor|preprocessor).*"
    r"|.*\.(model|tiktoken|jinja)"
)


@dataclass(frozen=True)
class Source:
    """Something of the user's that a step reads: the model, or one data set."""

    text: str  # an absolute path or a Hub id
    is_model: bool = False
    revision: str | None = None

    def describe(self) -> str:
        """How to name it in a sentence."""
        return f"the model {self.text}" if self.is_model else f"the data file {Path(self.text).name}"


def source_digest(source: Source) -> str | None:
    """Digest of what a source holds now; None for a Hub model that is not downloaded yet.

    A data set of the Hub counts by its name: what changes behind it is not seen.
    """
    if source.is_model:
        directory = model_directory(source)
        return None if directory is None else directory_digest(directory)
    path = Path(source.text)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file() and file.name[0] != ".")
        return sha256_json({name: file_digest(path / name) for name in names})
    return sha256_json({"hub": source.text})


def directory_digest(directory: Path) -> str:
    """Digest of all of a model directory that decides results: weights, config.json, tokenizer and chat templates."""
    names = (path.relative_to(directory) for path in directory.rglob("*") if _TOKENIZER_FILE.fullmatch(path.name))
    files = {name.as_posix(): file_digest(directory / name) for name in names if (directory / name).is_file()}
    return sha256_json({"model": model_digest(directory), "tokenizer": files})


def model_directory(source: Source) -> Path | None:
    """The model's directory where it is on this machine; never downloads."""
    if Path(source.text).is_absolute():
        return Path(source.text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(source.text, revision=source.revision, local_files_only=True))
        Checkpoint.open(directory)
    except (LocalEntryNotFoundError, InputError):  # absent, or some of its shards are
        return None
    return directory
