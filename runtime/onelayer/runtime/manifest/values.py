"""Checks single values of a manifest: paths, data sources, limits and names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StringConstraints, ValidationInfo

from onelayer.compiler.data.readers import check_first_rows
from onelayer.compiler.faults import unknown_name
from onelayer.compiler.sources.data_set import DataSet
from onelayer.compiler.sources.files import KINDS, kind_of
from onelayer.runtime.sizes import parse_size

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _local(text: str, info: ValidationInfo) -> str | None:
    """Return the absolute path of something that exists relative to the manifest's folder, else None."""
    try:
        path = _base(info) / Path(text).expanduser()
        return str(path.resolve()) if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        return None


def _base(info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("folder", Path.cwd())
    return base


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a path
        return False


def _data_source(value: Any, info: ValidationInfo) -> str | DataSet:
    """Check a path, or a mapping with more than a path. The first rows of a local source are read.

    Data of a diffusion pipeline are folders of images, which the encoding reads.
    """
    if (info.context or {}).get("images"):
        folder = _local(value, info) if isinstance(value, str) else None
        if folder is None or not Path(folder).is_dir():
            raise ValueError(f"{value}: is no folder of images in the manifest's folder")
        return folder
    if isinstance(value, str):
        path = _data_path(value, info)
        check_first_rows(DataSet(path=path))
        return path
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError("write a path, or a mapping with `path` and `split`, `config` or `columns`")
    for name in value:
        if name not in DataSet.model_fields:
            raise ValueError(f"{name}: {unknown_name(str(name), list(DataSet.model_fields), 'field')}")
    source = DataSet.of({**value, "path": _data_path(value["path"], info)})
    check_first_rows(source)
    return source if source.details else source.path


def _data_path(text: str, info: ValidationInfo) -> str:
    local = _local(text, info)
    if local is not None:
        if not Path(local).is_dir() and kind_of(Path(local)) is None:
            raise ValueError(f"{text}: unknown kind of data, use a {KINDS} file or a directory of them")
        return local
    if kind_of(Path(text)) is None and "/" in text and _HUB_ID.fullmatch(text) and not _exists(Path(text)):
        return text
    raise ValueError(f"{text}: no such file in the manifest's folder, paths are relative to the manifest")


def model_source(text: str, info: ValidationInfo) -> str:
    """Return the absolute path of a directory in the manifest's folder, or a Hub id unchanged."""
    local = _local(text, info)
    if local is not None:
        return local
    if _HUB_ID.fullmatch(text) and not _exists(Path(text)):
        return text
    raise ValueError(f"{text}: no such directory in the manifest's folder, and not a Hub id like org/name")


def checked_limit(value: Any) -> Any:
    """Map `none` to None, and refuse what is neither a number nor a known word."""
    if value is None or (isinstance(value, str) and value not in ("none", "auto", "default")):
        raise ValueError("write a number, `none` for no limit, `auto` or `default`")
    return None if value == "none" else value


def none_word(value: Any) -> Any:
    """Map the word `none` to None."""
    return None if value == "none" else value


def as_list(value: Any) -> Any:
    """Turn a single source of data into a list of one."""
    return [value] if isinstance(value, str | Mapping) else value


def checked_modules(value: Any) -> Any:
    """Refuse a value that cannot name modules."""
    if not isinstance(value, str | list):
        raise ValueError("write `all-linear`, a regular expression or a list of module names")
    return value


def size_in_bytes(value: Any) -> Any:
    """Convert a size like 24GiB to bytes; a whole number is bytes already."""
    return parse_size(str(value))


def new_folder(text: str, info: ValidationInfo) -> str:
    """Return the absolute path of a folder, which need not exist, relative to the manifest's folder."""
    try:
        return str((_base(info) / Path(text).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{text}: is not a path ({error}), write another one") from None


Size = Annotated[int, BeforeValidator(size_in_bytes), Field(gt=0)]
Folder = Annotated[str, AfterValidator(new_folder)]
DataSource = Annotated[str | DataSet, PlainValidator(_data_source, json_schema_input_type=str | DataSet)]
DataSources = Annotated[tuple[DataSource, ...], BeforeValidator(as_list), Field(min_length=1)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
