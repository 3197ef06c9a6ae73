"""Reads a YAML file into its plain document, with a fault per duplicate key."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import Fault, Location

# A manifest of a thousand tasks has 100 KB and ten thousand values.
LIMIT_BYTES = 1 << 20
LIMIT_NODES = 100_000
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
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise InputError(f"{path}: is not a file; give a manifest file")
        if path.exists() and path.stat().st_size > LIMIT_BYTES:
            raise InputError(f"{path}: larger than {LIMIT_BYTES >> 20} MiB; give a manifest file")
        node, document = _parsed(path.read_text(encoding="utf-8"))
        faults = _duplicates(node, (), set())
        return _expanded(document, (), faults), faults
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a manifest file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply for a manifest; see manifests/README.md") from None
    except (ValueError, LookupError) as error:  # of PyYAML's own conversions: the 99th of a month, ten thousand digits
        raise InputError(f"{path}: not valid YAML ({error}); put the value in quotes") from None


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """Parse a YAML text into its nodes and its document. Raises `ValueError` if aliases make too much of it."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if (count := _expanded_nodes(node, {})) > LIMIT_NODES:
            raise ValueError(f"its aliases make {count} values, more than the {LIMIT_NODES} of any manifest")
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values below a node as if each alias were written out; an alias of itself counts once."""
    if id(node) not in counted:
        counted[id(node)] = 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.CollectionNode):
            counted[id(node)] += sum(_expanded_nodes(part, counted) for part in parts)
    return counted[id(node)]


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
    try:
        return yaml.safe_load(expanded) if _VARIABLE.fullmatch(value) and expanded else expanded
    except (yaml.YAMLError, ValueError, LookupError):
        faults.append((where, f"the value of {value} cannot be read as YAML, put it in quotes"))
        return expanded


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
