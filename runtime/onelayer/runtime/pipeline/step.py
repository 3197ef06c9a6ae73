"""Defines a step and its sources: the user's models and data sets, with the digests of their present content.

Nothing here downloads. Held: nothing; a step executes only on request.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onelayer.compiler.data.readers import media_files
from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import DataSet
from onelayer.compiler.sources.files import data_files
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.digests import file_digest, sha256_json
from onelayer.compiler.storage.model_config import read_model_config
from onelayer.compiler.storage.pipeline_directory import INDEX_FILE, components_of, read_pipeline_index
from onelayer.compiler.storage.stamps import FileStamps
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
    """An input from the user that a step reads: the model, one data set, or files whose content alone counts."""

    text: str  # an absolute path or a Hub id
    is_model: bool = False
    is_plain: bool = False
    revision: str | None = None
    data: DataSet | None = None  # if more than the path decides what is read

    @classmethod
    def of(cls, data: str | DataSet) -> "Source":
        """Return the source that a manifest names as data."""
        return cls(data) if isinstance(data, str) else cls(data.path, data=data)

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


def model_path(model: Source) -> Path:
    """Return a model as the functions of steps take it: a path as it is, a Hub id as its downloaded snapshot.

    The path of a GGUF file is what adapters of it have to name.
    """
    path = Path(model.text)
    return path if path.is_absolute() else resolve_model(model.text, model.revision)


def source_digests(steps: Iterable[Step]) -> dict[Source, str | None]:
    """Digest every source that the steps read, each once."""
    sources = dict.fromkeys(source for step in steps for source in step.sources.values())
    return {source: source_digest(source) for source in sources}


def source_digest(source: Source) -> str | None:
    """Digest the present content of a source; None for a Hub model that is not downloaded yet.

    Files of images and audio that rows name count. A data set on the Hub is identified by its name alone, so a change
    of its content goes unnoticed.
    """
    if source.is_model:
        directory = model_directory(source)
        return None if directory is None else directory_digest(directory)
    content = _content_digest(source)
    if media := _media_files(source):
        content = sha256_json({"content": content, "media": {name: file_digest(path) for name, path in media.items()}})
    return content if source.data is None else sha256_json({"content": content, **source.data.details})


def _media_files(source: Source) -> dict[str, Path]:
    """Return the files of images and audio that the rows of a data set name, by their places next to it."""
    if source.is_plain:
        return {}
    base = Path(source.text) if Path(source.text).is_dir() else Path(source.text).parent
    files = media_files(source.data or DataSet(path=source.text))
    return {os.path.relpath(file, base): file for file in files}


def _content_digest(source: Source) -> str:
    """Digest a file, or all files of a directory by their places in it."""
    path = Path(source.text)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return sha256_json({file.relative_to(path).as_posix(): file_digest(file) for file in _data_files(source)})
    return sha256_json({"hub": source.text})


def given(role: str, data: tuple[str | DataSet, ...], inputs: Mapping[str, Path]) -> Any:
    """Return data as a function takes and records it: one source alone, several as a list."""
    found = all_given(role, data, inputs)
    return found[0] if len(found) == 1 else found


def all_given(role: str, data: tuple[str | DataSet, ...], inputs: Mapping[str, Path]) -> list[Any]:
    """Return data as a list; of images it is what an earlier step encoded."""
    return [path for name, path in inputs.items() if name == role or name.startswith(f"{role} ")] or list(data)


def data_sources(role: str, data: tuple[str | DataSet, ...] | None) -> dict[str, Source]:
    """Return data by their roles in a step. The first has the role of a single one, which keeps keys of old results."""
    sources = [Source.of(source) for source in data or ()]
    return {role if number == 1 else f"{role} {number}": source for number, source in enumerate(sources, 1)}


def holds_projectors(model: Source) -> bool:
    """Whether a model is one of several, with projectors between them; False while it is not downloaded."""
    directory = model_directory(model)
    return directory is not None and "text_config" in read_model_config(directory)


@contextmanager
def unchanged(step: Step, digests: Mapping[str, str], inputs: Mapping[str, Path]) -> Iterator[None]:
    """Check that what a step reads is what its key was made of, before it runs and after it.

    `digests` are those in the key, by role; `inputs` the folders of earlier results. Raises `InputError` naming what
    changed.
    """
    stamps = FileStamps(file for source in step.sources.values() for file in _files_of(source))
    stamps.add(file for folder in inputs.values() for file in folder.rglob("*") if file.is_file())
    for role, source in step.sources.items():
        if source_digest(source) != digests[role]:
            raise InputError(f"{source.text}: changed since this run began; run the same command again")
    yield
    stamps.check()


def _files_of(source: Source) -> list[Path]:
    """List the files that the digest of a source is made of."""
    path = model_directory(source) if source.is_model else Path(source.text)
    if path is None or not path.exists():
        return []
    if source.is_model:
        return [path / "config.json", *Checkpoint.open(path).files, *_tokenizer_files(path)]
    return [*([path] if path.is_file() else _data_files(source)), *_media_files(source).values()]


def _data_files(source: Source) -> list[Path]:
    """List what may be read of a directory: the files at the top, and those with rows below; or all of plain files."""
    directory = Path(source.text)
    if source.is_plain:
        return sorted(file for file in directory.rglob("*") if file.is_file())
    top = [file for file in directory.iterdir() if file.is_file() and file.name[0] != "."]
    return sorted({*top, *data_files(directory)[0]})


def _tokenizer_files(directory: Path) -> list[Path]:
    found = (path for path in directory.rglob("*") if _TOKENIZER_FILE.fullmatch(path.name))
    return [path for path in found if path.is_file()]


def pipeline_parts(directory: Path) -> dict[str, Source]:
    """Return what an encoding reads of a pipeline in addition to its denoiser: the models, and the files of the rest.

    Raises `InputError` if it is no pipeline.
    """
    parts = {"index": Source(str(directory / INDEX_FILE), is_plain=True)}
    for name in components_of(read_pipeline_index(directory)):
        path = directory / name
        if path.is_dir():
            is_model = (path / "config.json").is_file()
            parts[name] = Source(str(path), is_model=is_model, is_plain=not is_model)
    return parts


def directory_digest(directory: Path) -> str:
    """Digest the files of a model directory that decide results: weights, config.json, tokenizer and chat templates."""
    files = {path.relative_to(directory).as_posix(): file_digest(path) for path in _tokenizer_files(directory)}
    return sha256_json({"model": model_digest(directory), "tokenizer": files})


def model_directory(source: Source) -> Path | None:
    """Return the model's directory, of a pipeline that of its denoiser, if it is on this machine; never downloads."""
    path = Path(source.text)
    if path.is_absolute():
        return resolve_model(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(source.text, revision=source.revision, local_files_only=True))
        Checkpoint.open(directory)
    except (LocalEntryNotFoundError, InputError):  # the model or one of its shards is missing
        return None
    return directory
