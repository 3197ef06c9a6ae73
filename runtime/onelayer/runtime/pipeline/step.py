"""What a step is, and what it reads of the user's: models and data sets, with the digests of what they hold now.

Nothing here downloads. Held: nothing; a step executes only when it is asked to.
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

# Files next to the weights that decide which tokens a text becomes.
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|processor|preprocessor).*"
    r"|.*\.(model|tiktoken|jinja)"
)

# Executes a step: the payload folders of the steps it needs, and the folder to fill.
Execute = Callable[[Mapping[str, Path], Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """Something of the user's that a step reads: the model, or one data set."""

    text: str  # an absolute path or a Hub id
    is_model: bool = False
    revision: str | None = None

    def describe(self) -> str:
        """Name the source in a sentence."""
        return f"the model {self.text}" if self.is_model else f"the data file {Path(self.text).name}"


@dataclass(frozen=True)
class Step:
    """One piece of work. `kind` names its record in `STEP_KINDS`.

    `fields`, the digests of `sources` and those of the steps in `needs` enter its key. `needs` maps what an input is
    for to the step it comes from; a step in `optional` may fail. `ratio` gives the ratio of the emulator that a compile
    makes; it may read the original's headers. `passes` are settings that change no result, but how interrupted work is
    taken up.
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
        """List what work on this step depends on besides its key: where its inputs lie, and its passes."""
        return {
            "sources": {role: source.text for role, source in self.sources.items()},
            "inputs": {role: str(path) for role, path in inputs.items()},
            "passes": dict(self.passes),
        }


def model_source(manifest: Manifest) -> Source:
    """Return the original that a manifest names."""
    return Source(manifest.model.path, is_model=True, revision=manifest.model.revision)


def source_digests(steps: Iterable[Step]) -> dict[Source, str | None]:
    """Digest everything of the user's that the steps read, each once."""
    sources = dict.fromkeys(source for step in steps for source in step.sources.values())
    return {source: source_digest(source) for source in sources}


def source_digest(source: Source) -> str | None:
    """Digest what a source holds now; None for a Hub model that is not downloaded yet.

    A data set of the Hub counts by its name: a change of its content is not seen.
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
    """Digest all of a model directory that decides results: weights, config.json, tokenizer and chat templates."""
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
