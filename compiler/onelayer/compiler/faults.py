"""Translates pydantic's errors into plain words, each with its place in the document."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]
Fault = tuple[Location, str]  # the place in the document, and what is wrong


def first_detail(error: ValidationError) -> ErrorDetails:
    """Return pydantic's first finding."""
    return error.errors(include_url=False)[0]


def message_of(detail: ErrorDetails) -> str:
    """Return the message of a finding as the end of a sentence: `input should be a valid integer`."""
    message = detail["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def faults_of(error: ValidationError, model: type[BaseModel], document: Any) -> list[Fault]:
    """List pydantic's findings with locations that exist in the document, and for an unknown name the nearest one."""
    faults: dict[Location, list[str]] = {}
    for detail in error.errors():
        where = detail["loc"] if detail["type"] == "missing" else _existing(detail["loc"], document)
        text = _in_words(detail, model)
        if text not in faults.setdefault(where, []):
            faults[where].append(text)
    return [(where, " or ".join(texts)) for where, texts in faults.items()]


def _existing(where: Location, document: Any) -> Location:
    """Return the part of a location that is in the document: pydantic appends its own names for members of a union."""
    for depth, part in enumerate(where):
        inside = isinstance(document, Mapping) and part in document
        if not inside and not (isinstance(document, list) and isinstance(part, int) and part < len(document)):
            return where[:depth]
        document = document[part]
    return where


def _in_words(detail: ErrorDetails, model: type[BaseModel]) -> str:
    if detail["type"] == "missing":
        return "required, add it"
    if detail["type"] == "extra_forbidden":
        return unknown_name(str(detail["loc"][-1]), _field_names(model, detail["loc"][:-1]), "field")
    message, value = message_of(detail), detail["input"]
    if detail["type"] == "value_error" or (isinstance(value, Mapping | Sequence) and not isinstance(value, str)):
        return message
    return f"{message}, not {'null' if value is None else repr(value)}"


def unknown_name(name: str, valid: Sequence[str], what: str) -> str:
    """Say that a name is unknown, with the nearest valid one or, if none is near, all of a short list."""
    nearest = get_close_matches(name, valid, n=1, cutoff=0.6)
    if nearest:
        return f"unknown {what}, nearest is `{nearest[0]}`"
    return f"unknown {what}" + (f", valid are {', '.join(valid)}" if len(valid) <= 20 else "")


def _field_names(model: type[BaseModel], where: Location) -> list[str]:
    """List the fields of the model that validates the document at `where`."""
    annotation: Any = model
    for part in where:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = _model_in(annotation).model_fields[str(part)].annotation
    return list(_model_in(annotation).model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    """Return the model that an annotation like `Model` or `Model | None` names; unknown fields lie in one."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next(kind for kind in kinds if issubclass(kind, BaseModel))


def written(where: Location) -> str:
    """Format a location as people write it: `tasks.sql.args.learning_rate`, `data[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".") or "the document"
