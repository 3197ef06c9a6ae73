"""A folder of images or recordings in, rows out: the folder that a file lies in is its class."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError

KIND_OF_SUFFIX = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus"), "audio"),
}
FILE_NAME = "file_name"  # the column of a metadata.jsonl that names a file next to it


def media_kind(name: str) -> str | None:
    """Return "image" or "audio" for the name of such a file, else None."""
    return KIND_OF_SUFFIX.get(Path(name).suffix.lower())


def class_rows(directory: Path, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a row with a class for each image or recording below a directory, in the order of their names.

    With `split`, of the folder of that name in it. Raises `InputError` for a file that lies in no class's folder.
    """
    top = directory if split is None else directory / split
    files = sorted(file for file in top.rglob("*") if media_kind(file.name) and file.is_file())
    for number, file in enumerate(files, start=1):
        if file.parent == top:
            raise InputError(
                f"{file}: lies in no folder of a class; move it into one, or write a metadata.jsonl with {FILE_NAME}"
            )
        path = file.relative_to(directory).as_posix()
        yield number, {str(media_kind(file.name)): path, "label": file.parent.name}


def with_named_file(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of a metadata.jsonl with the file that it names as its image or recording."""
    name = row.get(FILE_NAME)
    kind = media_kind(name) if isinstance(name, str) else None
    return row if kind is None or row.get(kind) is not None else {**row, kind: name}
