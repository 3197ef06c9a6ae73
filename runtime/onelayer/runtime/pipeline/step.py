"""Defines a step and its sources: the user's models and data sets, with the digests of their present content.

Nothing here downloads. Held: nothing; a step executes only on request.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.digests import file_digest, sha256_json
from onelayer.runtime.manifest.manifest import Manifest

# Files next to the weights that decide how a text is tokenized.
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|processor|preprocessor).*"
    r"|.*\.(model|tiktoken|jinja)"
)

# The function that executes a step, given the payload folders of the steps it needs and the folder to fill.
Execute = Callable[[Mapping[str, Path], Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """An input from the user that a step reads: the model, or one data set."""

    text: str  # an absolute path or a Hub id
    is_model: bool = False
    revision: str | None = None

    def describe(self) -> str:
        """Name the source in a sentence."""
        return f"the model {self.text}" if self.is_model else f"the data file {Path(self.text).name}"


@dataclass(frozen=True)
class Step:
    """One piece of work. `kind` names its record in `STEP_KINDS`.

    `fields`, the digests of `sources` and those of the steps in `needs` enter its key. `needs` maps the role of an
    input to the step it comes from; a step in `optional` may fail. `ratio` returns the ratio of the emulator that a
    compile makes, and may read the original's headers. `passes` are settings that change no result, only how
    interrupted work resumes.
    """

    name: str
    kind: str
    execute: Execute
    fields: Mapping[str, Any]
    sources: Mapping[str, Source]
    needs: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    task: str | None = None
    ratio: Callable[[], float] | None = None
    passes: Mapping[str, Any] = field(default_factory=dict)

    def begun_with(self, inputs: Mapping[str, Path]) -> dict[str, Any]:
        """List what work on this step depends on in addition to its key: the paths of its inputs, and its passes."""
        return {
            "sources": {role: source.text for role, source in self.sources.items()},
            "inputs": {role: str(path) for role, path in inputs.items()},
            "passes": dict(self.passes),
        }


def model_source(manifest: Manifest) -> Source:
    """Return the original that a manifest names."""
    return Source(manifest.model.path, is_model=True, revision=manifest.model.revision)


def source_digests(steps: Iterable[Step]) -> dict[Source, str | None]:
    """Digest every source that the steps read, each once."""
    sources = dict.fromkeys(source for step in steps for source in step.sources.values())
    return {source: source_digest(source) for source in sources}


def source_digest(source: Source) -> str | None:
    """Digest the present content of a source; None for a Hub model that is not downloaded yet.

    A data set on the Hub is identified by its name alone, so a change of its content goes unnoticed.
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
    """Digest the files of a model directory that decide results: weights, config.json, tokenizer and chat templates."""
    names = (path.relative_to(directory) for path in directory.rglob("*") if _TOKENIZER_FILE.fullmatch(path.name))
    files = {name.as_posix(): file_digest(directory / name) for name in names if (directory / name).is_file()}
    return sha256_json({"model": model_digest(directory), "tokenizer": files})


def model_directory(source: Source) -> Path | None:
    """Return the model's directory if it is on this machine; never downloads."""
    if Path(source.text).is_absolute():
        return Path(source.text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(source.text, revision=source.revision, local_files_only=True))
        Checkpoint.open(directory)
    except (LocalEntryNotFoundError, InputError):  # the model or one of its shards is missing
        return None
    return directory
