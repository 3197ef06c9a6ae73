"""Values of a row's fields in, checked values out; a fault names the row and the field."""

import json
from collections.abc import Mapping

from onelayer.compiler.errors import InputError


def parsed(value: object) -> object:
    """Return what a JSON text holds, and anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def checked_string(value: object, source: str, field: str, remedy: str = "; remove the row or fill it in") -> str:
    """Check a string: not blank, and encodable in UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{source}: field '{field}' must be a string, not {kind_name(value)}")
    if not value.strip():
        raise InputError(f"{source}: field '{field}' is empty{remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: field '{field}' holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


def kind_name(value: object) -> str:
    """Name the value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
