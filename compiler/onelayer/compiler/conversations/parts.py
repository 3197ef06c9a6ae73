"""Contents of messages with images or audio in, parts in one form out, each with the medium that it shows.

A content is a string or a list of parts. A part of text is {"type": "text", "text"}; one of a medium is {"type": kind}
here, and its source is in the row's list of media, which has the order of the parts.
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onelayer.compiler.conversations.fields import checked_string, kind_name, parsed
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import Folder, MediaKind, MediaSource, decoded, media_source

Message = dict[str, Any]
Given = Mapping[MediaKind, Sequence[MediaSource]]

KINDS: tuple[MediaKind, ...] = ("image", "audio")
FIELDS: Mapping[MediaKind, tuple[str, str]] = {"image": ("image", "images"), "audio": ("audio", "audios")}
MEDIA_FIELDS = tuple(name for names in FIELDS.values() for name in names)
REFUSED_FIELDS = ("videos", "video")
MARK = re.compile("<(image|audio)>")
SOURCE = "source"  # the key of a part's own source until it is placed


def given_media(row: Mapping[str, Any], source: str, folder: Folder | None) -> Given:
    """Return the media in the fields of a row, in order. Raises `InputError` for videos and for wrong sources."""
    for name in REFUSED_FIELDS:
        if row.get(name):
            raise InputError(
                f"{source}: field '{name}': videos are not supported; write some of its frames as 'images'"
            )
    found: dict[MediaKind, list[MediaSource]] = {}
    for kind, (single, several) in FIELDS.items():
        one, many = row.get(single), _listed(row.get(several))
        if isinstance(_listed(one), list):  # published sets use either name for a list
            one, many, several = None, _listed(one), single
        if one is not None and many:
            raise InputError(f"{source}: has both '{single}' and '{several}'; keep one")
        if many is not None and not isinstance(many, list):
            raise InputError(f"{source}: field '{several}' must be a list, not {kind_name(many)}; write '{single}'")
        items = (
            [(single, one)] if one is not None else [(f"{several}[{at}]", item) for at, item in enumerate(many or ())]
        )
        found[kind] = [media_source(item, kind, f"{source}: field '{name}'", folder) for name, item in items]
    return {kind: sources for kind, sources in found.items() if sources}


def _listed(value: object) -> object:
    """Return the list of a JSON text: tables have no lists."""
    return parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def checked_parts(content: object, source: str, where: str, folder: Folder | None) -> Any:
    """Return a content as one string, or as parts if a medium is among them; any other content as it is.

    Raises `InputError` for parts that are neither text, image nor audio.
    """
    if not isinstance(content, list) or not content:
        return content
    if not all(isinstance(part, Mapping) and part.get("type") is not None for part in content):
        raise InputError(f"{source}: field '{where}' must be a string, not a list; join its parts")
    parts = [_part(part, source, f"{where}[{at}]", folder) for at, part in enumerate(content)]
    if any(part["type"] != "text" for part in parts):
        return [part for part in parts if part.get("text") != ""]
    return "".join(part["text"] for part in parts)


def _part(part: Mapping[str, Any], source: str, field: str, folder: Folder | None) -> dict[str, Any]:
    """Check one part."""
    kind, where = part["type"], f"{source}: field '{field}'"
    if kind == "text":
        text = part.get("text")
        blank = isinstance(text, str) and not text.strip()
        return {"type": "text", "text": text if blank else checked_string(text, source, f"{field}.text")}
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        return {"type": "image", SOURCE: media_source(url, "image", f"{source}: field '{field}.image_url'", folder)}
    if kind not in KINDS:
        refused = "videos are not supported; write some frames as images" if "video" in str(kind) else "remove it"
        raise InputError(f"{where} has the type '{kind}', and parts are of type 'text', 'image' or 'audio'; {refused}")
    own = [(name, part[name]) for name in (kind, "url", "path", "base64") if part.get(name) is not None]
    if len(own) > 1:
        raise InputError(f"{where} has several sources ({', '.join(name for name, _ in own)}); keep one")
    if not own:
        return {"type": kind}
    [(name, value)] = own
    where = f"{source}: field '{field}.{name}'"
    found = decoded(value, kind, where) if name == "base64" else media_source(value, kind, where, folder)
    return {"type": kind, SOURCE: found}


def placed(messages: Sequence[Message], given: Given, source: str) -> tuple[list[Message], tuple[MediaSource, ...]]:
    """Place the media of a row's fields in its messages, and list all media in the order of their parts.

    A part with a source keeps it. The others take the given media in order, and so do marks (`<image>`) in strings.
    Without either, media stand before the text of the first user message. Raises `InputError` for a part without a
    medium and a medium without a part.
    """
    marked = [
        {**message, "content": _split(message["content"], {} if message["role"] == "assistant" else given)}
        for message in messages
    ]
    for kind, sources in given.items():
        if not any(_is_hole(part, kind) for part in _all_parts(marked)):
            user = next((message for message in marked if message["role"] == "user"), None)
            if user is None:
                raise InputError(f"{source}: has {kind}s and no user message to show them in; add one")
            user["content"] = [*({"type": kind} for _ in sources), *_as_parts(user["content"])]
    waiting = {kind: deque(given.get(kind, ())) for kind in KINDS}
    media: list[MediaSource] = []
    for part in _all_parts(marked):
        if part["type"] in waiting:
            queue, own = waiting[part["type"]], part.pop(SOURCE, None)
            if own is None and not queue:
                count = len(given.get(part["type"], ()))
                raise InputError(
                    f"{source}: has more places for {part['type']}s than {part['type']}s ({count}); add them"
                )
            media.append(own or queue.popleft())
    for kind, left in waiting.items():
        if left:
            raise InputError(f"{source}: {len(left)} of its {kind}s have no place; write <{kind}> where each belongs")
    return marked, tuple(media)


def placed_in_text(text: str, given: Given, source: str) -> tuple[str, tuple[MediaSource, ...]]:
    """Place media in a prompt that is a string; it then has one mark for each of them, in order."""
    [message], media = placed([{"role": "user", "content": text}], given, source)
    parts = _as_parts(message["content"])
    return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts), media


def texts_of(message: Message) -> list[str]:
    """List the texts of a message, between which its media stand."""
    return [part["text"].strip() for part in _as_parts(message["content"]) if part["type"] == "text"]


def text_of(message: Message) -> str:
    """Return the text of a message, without its media."""
    return "".join(part["text"] for part in _as_parts(message["content"]) if part["type"] == "text")


def with_text(message: Message, text: str) -> Message:
    """Return a message with other text in place of each of its texts."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    return {**message, "content": [{**part, "text": text} if part["type"] == "text" else part for part in content]}


def _split(content: Any, given: Given) -> Any:
    """Return a string with marks as parts, and a copy of a list; marks are text in a row without such media."""
    if not isinstance(content, str):
        return [dict(part) for part in content]
    pieces = MARK.split(content)
    if not any(kind in given for kind in pieces[1::2]):
        return content
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index % 2 and piece in given:
            parts.append({"type": piece})
        elif piece or index % 2:
            parts.append({"type": "text", "text": f"<{piece}>" if index % 2 else piece})
    return parts


def _as_parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def _all_parts(messages: Iterable[Message]) -> Iterable[dict[str, Any]]:
    return (part for message in messages if isinstance(message["content"], list) for part in message["content"])


def _is_hole(part: Mapping[str, Any], kind: MediaKind) -> bool:
    return part["type"] == kind and SOURCE not in part
