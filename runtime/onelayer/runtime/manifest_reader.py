"""A YAML file in, its plain document and its faults out: duplicate keys, and pydantic's findings in plain words."""

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from onelayer.compiler.errors import InputError

Location = tuple[int | str, ...]
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
Fault = tuple[Location, str]  # where in the document, and what is wrong there


class _Loader(yaml.SafeLoader):
    """YAML whose keys are always text: a task may be called `no` or `2`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[Any, list[Fault]]:
    """The document of a YAML file and a fault per duplicate key; raises `InputError` where it is no YAML at all."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        document = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a manifest file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    faults = _duplicates(node, (), set())
    return _expanded(document, (), faults), faults


def _expanded(value: Any, where: Location, faults: list[Fault], above: tuple[int, ...] = ()) -> Any:
    """The document with `${NAME}` in its texts replaced by the environment's value, `${NAME:-text}` by text without.

    `above` are the mappings and lists around it: an alias of one of them is left as it is, for checking to refuse.
    """
    if id(value) in above:
        return value
    above = (*above, id(value))
    if isinstance(value, dict):
        return {name: _expanded(item, (*where, name), faults, above) for name, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, (*where, index), faults, above) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        text = os.environ.get(found[1], found[2])
        if text is None:
            faults.append(
                (where, f"the environment variable {found[1]} is not set, set it or write ${{{found[1]}:-default}}")
            )
        return text or ""

    expanded = _VARIABLE.sub(replace, value)
    # `${RATIO}` alone is what it stands for: a number, if it reads as one.
    return yaml.safe_load(expanded) if _VARIABLE.fullmatch(value) and expanded else expanded


def _duplicates(node: yaml.Node | None, where: Location, seen: set[int]) -> list[Fault]:
    """Keys that one mapping holds twice: YAML keeps the last and says nothing. `seen` stops an alias of itself."""
    if node is None or id(node) in seen:
        return []
    seen.add(id(node))
    faults: list[Fault] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                faults.append(((*where, key.value), f"given twice, on lines {lines[key.value]} and {line}, keep one"))
            lines[key.value] = line
            faults += _duplicates(value, (*where, key.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            faults += _duplicates(value, (*where, index), seen)
    return faults


def faults_of(error: ValidationError, model: type[BaseModel], document: Any) -> list[Fault]:
    """Pydantic's findings with locations that exist in the document, and the nearest name beside an unknown one."""
    faults: dict[Location, list[str]] = {}
    for detail in error.errors():
        where = detail["loc"] if detail["type"] == "missing" else _existing(detail["loc"], document)
        text = _in_words(detail, model)
        if text not in faults.setdefault(where, []):
            faults[where].append(text)
    return [(where, " or ".join(texts)) for where, texts in faults.items()]


def _existing(where: Location, document: Any) -> Location:
    """The part of a location that is in the document: pydantic appends names of its own for the members of a union."""
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
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    if detail["type"] == "value_error" or (isinstance(value, Mapping | Sequence) and not isinstance(value, str)):
        return message[0].lower() + message[1:]
    return f"{message[0].lower()}{message[1:]}, not {'null' if value is None else repr(value)}"


def unknown_name(name: str, valid: Sequence[str], what: str) -> str:
    """Say that a name is unknown, with the nearest valid one or, where none is near, all of a short list."""
    nearest = get_close_matches(name, valid, n=1, cutoff=0.6)
    if nearest:
        return f"unknown {what}, nearest is `{nearest[0]}`"
    return f"unknown {what}" + (f", valid are {', '.join(valid)}" if len(valid) <= 20 else "")


def _field_names(model: type[BaseModel], where: Location) -> list[str]:
    """The fields of the model that validates the document at `where`."""
    annotation: Any = model
    for part in where:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = _model_in(annotation).model_fields[str(part)].annotation
    return list(_model_in(annotation).model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    """The model that an annotation like `Model` or `Model | None` names; an unknown field lies in one by definition."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next(kind for kind in kinds if issubclass(kind, BaseModel))


def written(where: Location) -> str:
    """A location as people write it: `tasks.sql.args.learning_rate`, `data[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".") or "the document"
