"""Checks documents from the disk against a pydantic model: the first fault becomes one line."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from onelayer.compiler.errors import InputError
from onelayer.compiler.faults import first_detail, message_of

ModelT = TypeVar("ModelT", bound=BaseModel)


def checked_document(model: type[ModelT], document: Any, file: Path, remedy: str, section: str | None = None) -> ModelT:
    """Return the document as a `model`.

    Raises `InputError` that names the file, the first wrong field (below `section` of the file), what is wrong and the
    remedy.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = first_detail(error)
        where = first["loc"] if section is None else (section, *first["loc"])
        value = first["input"]
        has = f" (has {value!r})" if isinstance(value, bool | int | float | str) else ""
        field = ".".join(str(part) for part in where)
        raise InputError(f"{file}: field {field}: {message_of(first)}{has}; {remedy}") from None
