"""Where rows come from, and under which names: one source of data as users name it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import unknown_name
from onelayer.compiler.settings import Settings
from onelayer.compiler.sources.shapes import COLUMNS


class DataSet(Settings):
    """A file, a directory or a Hub id, with what a name alone does not say."""

    path: str
    split: str | None = Field(
        default=None, min_length=1, description="Split of Hub data (train if not given), or of the files of a folder."
    )
    config: str | None = Field(default=None, min_length=1, description="Configuration of a Hub data set.")
    columns: dict[str, str] = Field(default={}, description="Names of the columns: prompt=question,completion=answer.")

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"{name}: {unknown_name(name, COLUMNS, 'column')}")
        return columns

    @property
    def details(self) -> dict[str, Any]:
        """The fields other than the path that were given."""
        return self.model_dump(exclude={"path"}, exclude_defaults=True)

    def __str__(self) -> str:
        """Name the data in a message or a record."""
        columns = ",".join(f"{name}={theirs}" for name, theirs in self.columns.items())
        parts = {"split": self.split, "config": self.config, "columns": columns}
        given = [f"{name} {value}" for name, value in parts.items() if value]
        return f"{self.path} ({', '.join(given)})" if given else self.path

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


OneSource = str | Path | DataSet
DataSource = OneSource | Sequence[OneSource]


def data_set(
    path: str | Path, *, split: str | None = None, config: str | None = None, columns: Mapping[str, str] | None = None
) -> DataSet:
    """Name a data set whose rows need more than a path: a split or a configuration, or other names of the columns.

    `columns` maps the names of fields to those of the data, like {"prompt": "question", "completion": "answer"}; all
    others are ignored. Raises `InputError` for an unknown field.
    """
    return DataSet.of({"path": str(path), "split": split, "config": config, "columns": dict(columns or {})})


def data_sets(data: DataSource) -> list[DataSet]:
    """List the sources of `data` in order."""
    sources = [data] if isinstance(data, str | Path | DataSet) else list(data)
    return [source if isinstance(source, DataSet) else DataSet(path=str(source)) for source in sources]


def names_of(data: DataSource) -> str:
    """Name all sources of `data` in a message."""
    return ", ".join(str(source) for source in data_sets(data))


def places(data: DataSource) -> dict[str, Any]:
    """Name the data for the record: one source as `path`, several as `paths`, in the order in which they were read."""
    sources = data_sets(data)
    return {"path": str(sources[0])} if len(sources) == 1 else {"paths": [str(source) for source in sources]}


def parse_columns(text: str) -> dict[str, str]:
    """Parse `prompt=question,completion=answer`. Raises `InputError` if it has another form."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and theirs.strip() for name, _, theirs in pairs):
        raise InputError(f"--columns {text}: must look like prompt=question,completion=answer")
    return {name.strip(): theirs.strip() for name, _, theirs in pairs}
