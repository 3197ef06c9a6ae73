"""A folder of images with captions in; rows, and pixels of one square size, out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.media.images import read_image
from onelayer.compiler.media.sources import Folder, MediaSource, media_source
from onelayer.compiler.sources.files import file_rows
from onelayer.compiler.storage.files import check_directory

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a folder; `is_class` tells images of the class from those of the subject."""

    source: MediaSource
    caption: str
    is_class: bool


def captioned_images(folder: str | Path, prompt: str | None, option: str, *, is_class: bool) -> list[CaptionedImage]:
    """List the images of a folder with their captions, in the order of `metadata.jsonl` or of their names.

    A caption is that of `metadata.jsonl` (`file_name` and `text`), else of a `.txt` file next to the image, else
    `prompt`, which `option` names. Raises `InputError` naming the first image without any, and what is no image.
    """
    directory = Path(folder)
    if directory.is_file():
        raise InputError(f"{folder}: is a file; give the folder that holds the images")
    check_directory(directory, "give a folder of images")
    place = Folder(directory, directory)
    rows = []
    for name, caption, where in _entries(directory):
        source = media_source(name, "image", where, place)
        beside = (directory / name).with_suffix(".txt")
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip()
        caption = caption or prompt
        if not caption:
            raise InputError(
                f"{where}: has no caption; write {METADATA} with file_name and text, {beside.name}, or give {option}"
            )
        rows.append(CaptionedImage(source, caption, is_class))
    if not rows:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); give a folder of images")
    return rows


def _entries(directory: Path) -> Iterator[tuple[Any, str | None, str]]:
    """Yield name, caption and place of every image."""
    table = directory / METADATA
    if not table.is_file():
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                yield path.name, None, str(path)
        return
    for number, row in file_rows(table):
        where = f"{table}:{number}"
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(f"{where}: field file_name: names no image; write the image's path in this folder")
        captions = [row[name] for name in CAPTION_FIELDS if row.get(name) is not None]
        if any(not isinstance(caption, str) for caption in captions[:1]):
            raise InputError(f"{where}: field text: is no text; write the caption")
        yield row["file_name"], (captions[0].strip() if captions else None), where


def pixels(image: CaptionedImage, size: int) -> torch.Tensor:
    """Read an image as (1, 3, size, size) in -1..1, scaled and cropped in the middle.

    Raises `InputError` for an image that would have to be enlarged more than twice.
    """
    from PIL import Image, ImageOps

    picture = read_image(image.source)
    if 2 * min(picture.size) < size:
        raise InputError(
            f"{image.source}: has {picture.width} x {picture.height} pixels, too few for --resolution {size}; give a "
            "larger image or a lower resolution"
        )
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1)
    return values.permute(2, 0, 1)[None].contiguous()
