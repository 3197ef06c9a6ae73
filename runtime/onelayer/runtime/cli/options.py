"""The options of the commands, with their help and parsers.

The options of a pass come from its settings model (`settings_options`); this module defines the others.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ParamSpec, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Gt
from pydantic import BaseModel

from onelayer.compiler.settings import Option, marker, members
from onelayer.compiler.sources.data_set import data_set, parse_columns
from onelayer.runtime.sizes import parse_size


def parse_limit(text: str | float | None) -> float | str | None:
    """Parse a number, "none" (None), or one of two words."""
    if text is None or text == "none":
        return None
    if text in ("auto", "default"):
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor `none`, `auto` or `default`") from None


def rank_parser(word: str) -> Callable[[str | float], int | float | str]:
    """Make a parser of a whole number, a share below 1, or `word`."""

    def parse(text: str | float) -> int | float | str:
        if text == word or not isinstance(text, str):
            return text
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither a number of rows, nor a share like 0.125, nor `{word}`"
            ) from None

    return parse


def parse_target_modules(text: str) -> str | list[str]:
    """Split plain names separated by commas into a list; keep anything else ("all-linear", a regular expression)."""
    names = text.split(",")
    return names if all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def parse_bytes(text: str | int) -> int:
    """Parse a size like 24GiB, 500MB or 1000 into bytes."""
    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; must be empty or not exist yet.")]
Data = Annotated[
    list[str],
    typer.Option(
        metavar="DATA",
        help="A .jsonl, .json, .csv, .txt or .parquet file, a directory, or a Hub id; rows for a classifier: text and "
        "label; may be repeated.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Names of the data's columns, like prompt=question,completion=answer."),
]
Split = Annotated[
    str | None, typer.Option(help="Split of Hub data (train if not given), or of the files of a directory.")
]
Config = Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")]
Calibration = Annotated[
    list[str],
    typer.Option(metavar="DATA", help="Text similar to your tasks': file, directory or Hub id; may be repeated."),
]
Ratio = Annotated[float, typer.Option(help="Share of each linear's parameters that the emulator keeps, 0 to 1.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw an emulator's errors and spectra (.png, .svg or .pdf).")
]
Adapters = Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Adapter to score too; may be repeated.")]
HeldOut = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", help="Held-out data to choose the correction by; may be repeated."),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(metavar="FACTOR", help="Scale of what an adapter adds, 1 if not given; one for each adapter."),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Emulator of MODEL, to measure how far its predictions are from the original's."),
]
Memory = Annotated[
    int,
    typer.Option("--memory", parser=parse_bytes, metavar="SIZE", help="Memory of the device to plan for, like 24GiB."),
]
HostMemoryToPlan = Annotated[
    int | None,
    typer.Option(
        "--host-memory",
        parser=parse_bytes,
        metavar="SIZE",
        help="Host memory of a streamed training to plan for; it keeps the layers that fit. Default: it keeps none.",
    ),
]
CompileMemory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        parser=parse_bytes,
        metavar="SIZE",
        help="Instead of a ratio: the best ratio and factor dtype that can be trained on a device of this size.",
    ),
]
MaxSize = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="Remove the least recently used artifacts until the store fits in this size.",
    ),
]

P = ParamSpec("P")
READERS: dict[str, Callable[[Any], Any]] = {
    "bytes": parse_bytes,
    "limit": parse_limit,
    "modules": parse_target_modules,
    "rank_or_auto": rank_parser("auto"),
    "rank_or_exact": rank_parser("exact"),
}


def settings_options(
    keywords: type,
    *models: type[BaseModel],
    omit: tuple[str, ...] = (),
    after: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Give a command with `**settings: Unpack[keywords]` one option per keyword, from its field in `models`.

    `omit` names keywords without an option. Keyword-only parameters of the command come last, or `after` a setting.
    """
    preceding = after or {}

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        own = inspect.signature(command).parameters.values()
        first = [item for item in own if item.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        last = [item for item in own if item.kind is inspect.Parameter.KEYWORD_ONLY]
        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in first]
        for name in get_type_hints(keywords):
            if name not in omit:
                parameters.append(_option(name, next(model for model in models if name in model.model_fields)))
                parameters += [item for item in last if preceding.get(item.name) == name]
        parameters += [item for item in last if item.name not in preceding]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def reads_data(command: Callable[P, None]) -> Callable[P, None]:
    """Give a command the options that say more about all its data than their paths."""
    added = {"columns": Columns, "split": Split, "config": Config}

    @wraps(command)
    def with_sources(*args: P.args, **kwargs: P.kwargs) -> None:
        columns, split, config = (kwargs.pop(name, None) for name in added)
        names = None if columns is None else parse_columns(str(columns))
        details: dict[str, Any] = {"split": split, "config": config, "columns": names}
        for name in ("data", "calibration", "eval_data"):
            paths: Any = kwargs.get(name)
            if paths and any(value is not None for value in details.values()):
                kwargs[name] = [data_set(path, **details) for path in paths]
        command(*args, **kwargs)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in added.items()
    ]
    signature = inspect.signature(command)
    with_sources.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *parameters]
    )
    return with_sources


def _option(name: str, model: type[BaseModel]) -> inspect.Parameter:
    """Build the parameter for a field, as typer reads it."""
    field, shown = model.model_fields[name], marker(model, name, Option)
    kinds = [kind for kind in members(field.annotation) if kind is not NoneType]
    kind: Any = Any if shown.reader else float if float in kinds else kinds[0]
    if get_origin(kind) is list:
        kind = list[members(get_args(kind)[0])[0]]  # type: ignore[misc]  # typer reads no limits of items
    least = _least(field.annotation, field.metadata) if kind is int else None
    option = typer.Option(
        *([shown.flags] if shown.flags else []),
        help=field.description,
        metavar=shown.metavar,
        parser=READERS[shown.reader] if shown.reader else None,
        show_default=shown.default or True,
        min=least,
    )
    given: Any = kind | None if field.default is None and kind is not Any else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[given, option]
    )


def _least(annotation: Any, metadata: Sequence[Any] = ()) -> int | None:
    """Return the smallest whole number that an annotation like `PositiveInt | None` allows."""
    for item in metadata:
        if isinstance(item, Gt | Ge):
            return int(str(item.gt)) + 1 if isinstance(item, Gt) else int(str(item.ge))
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _least(parts[0], parts[1:])
    return next((least for part in parts if (least := _least(part)) is not None), None)
