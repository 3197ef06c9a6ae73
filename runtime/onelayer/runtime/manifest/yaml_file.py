"""Reads a YAML file into its plain document, with a fault per duplicate key."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import Fault, Location

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML whose keys are always text: a task may be called `no` or `2`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[Any, list[Fault]]:
    """Return the document of a YAML file and a fault per duplicate key. Raises `InputError` if it is not valid YAML."""
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
    """Replace `${NAME}` in a document's texts by the environment's value; `${NAME:-text}` has a default.

    `above` are the enclosing mappings and lists. An alias of one of them stays unchanged, and validation refuses it.
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
    # `${RATIO}` alone takes the type of its value: a number if it parses as one.
    return yaml.safe_load(expanded) if _VARIABLE.fullmatch(value) and expanded else expanded


def _duplicates(node: yaml.Node | None, where: Location, seen: set[int]) -> list[Fault]:
    """Find keys that one mapping holds twice: YAML silently keeps the last. `seen` stops at an alias of itself."""
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
