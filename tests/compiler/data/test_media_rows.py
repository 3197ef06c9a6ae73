"""Rows with images and audio: every form in, the media at their places out; broken rows in, one clear line out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.media_files import data_uri, encoded, picture, recording
from onelayer.compiler.data.readers import media_files, read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import DataSet

ASKED = {"role": "user", "content": "what?"}
SAID = {"role": "assistant", "content": "a cat"}
HOLE = {"type": "image"}
SOUND = {"type": "audio"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    data = root / "data"
    (data / "inner").mkdir(parents=True)
    for name in ("a.png", "b.png", "inner/c.png"):
        picture().save(data / name)
    picture().save(root / "outside.png")
    recording(data / "a.wav")
    (data / "empty.png").write_bytes(b"")
    os.symlink(root / "outside.png", data / "link.png")
    os.mkfifo(data / "pipe.png")
    return data


def read(row: dict[str, Any], folder: Path) -> Example:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [example] = read_examples(file)
    return example


def shown(example: Example) -> tuple[Any, list[str]]:
    """Return what stands where the media are, and the names of these in order."""
    messages = example.messages or (example.prompt if isinstance(example.prompt, list) else None)
    content: Any = messages[0]["content"] if messages else example.prompt
    names = [Path(source.name).name for source in example.media]
    assert [source.kind for source in example.media if source.path] == [
        {"png": "image", "wav": "audio"}[name[-3:]]
        for name, source in zip(names, example.media, strict=True)
        if source.path
    ]
    return content, names


URI = data_uri(picture())
CHAT = [ASKED, SAID]
FORMS: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "image": ({"image": "a.png", "messages": CHAT}, [HOLE, text("what?")], ["a.png"]),
    "images": ({"images": ["a.png", "b.png"], "messages": CHAT}, [HOLE, HOLE, text("what?")], ["a.png", "b.png"]),
    "list": ({"image": ["a.png", "b.png"], "messages": CHAT}, [HOLE, HOLE, text("what?")], ["a.png", "b.png"]),
    "table": ({"images": '["a.png"]', "messages": CHAT}, [HOLE, text("what?")], ["a.png"]),
    "null": ({"image": None, "images": [], "audio": None, "messages": CHAT}, "what?", []),
    "mark": (
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID]},
        [HOLE, text(" or "), HOLE, text("?")],
        ["a.png", "b.png"],
    ),
    "mark without media": ({"messages": [{"role": "user", "content": "the <image> tag"}, SAID]}, "the <image> tag", []),
    "other mark": (
        {"image": "a.png", "messages": [{"role": "user", "content": "<image> <audio>"}, SAID]},
        [HOLE, text(" "), text("<audio>")],
        ["a.png"],
    ),
    "hole": (
        {"image": "a.png", "messages": [user(text("see "), HOLE), SAID]},
        [text("see "), HOLE],
        ["a.png"],
    ),
    "own source": (
        {"images": ["b.png"], "messages": [user({**HOLE, "path": "a.png"}, HOLE, text("x")), SAID]},
        [HOLE, HOLE, text("x")],
        ["a.png", "b.png"],
    ),
    "part image": ({"messages": [user({**HOLE, "image": "a.png"}, text("x")), SAID]}, [HOLE, text("x")], ["a.png"]),
    "part url": ({"messages": [user({**HOLE, "url": "a.png"}, text("x")), SAID]}, [HOLE, text("x")], ["a.png"]),
    "part base64": (
        {"messages": [user({**HOLE, "base64": URI.partition(",")[2]}, text("x")), SAID]},
        [HOLE, text("x")],
        ["embedded bytes"],
    ),
    "image_url": (
        {"messages": [user({"type": "image_url", "image_url": {"url": URI}}, text("x")), SAID]},
        [HOLE, text("x")],
        ["embedded bytes"],
    ),
    "nulls of Arrow": (
        {"messages": [user({**HOLE, "text": None, "image": "a.png"}, {**text("x"), "image": None}), SAID]},
        [HOLE, text("x")],
        ["a.png"],
    ),
    "data URI": ({"image": URI, "messages": CHAT}, [HOLE, text("what?")], ["embedded bytes"]),
    "path of datasets": (
        {"image": {"bytes": None, "path": "a.png"}, "messages": CHAT},
        [HOLE, text("what?")],
        ["a.png"],
    ),
    "folder": ({"image": "inner/c.png", "messages": CHAT}, [HOLE, text("what?")], ["c.png"]),
    "prompt": ({"image": "a.png", "prompt": "what?", "completion": "a"}, "<image>what?", ["a.png"]),
    "marked prompt": ({"image": "a.png", "prompt": "see <image>!", "completion": "a"}, "see <image>!", ["a.png"]),
    "messages of a prompt": (
        {"image": "a.png", "prompt": [ASKED], "completion": [SAID]},
        [HOLE, text("what?")],
        ["a.png"],
    ),
    "choices": ({"image": "a.png", "prompt": "is?", "choices": ["x", "y"], "answer": 1}, "<image>is?", ["a.png"]),
    "audio": ({"audio": "a.wav", "messages": CHAT}, [SOUND, text("what?")], ["a.wav"]),
    "both": (
        {"image": "a.png", "audios": ["a.wav"], "messages": [{"role": "user", "content": "<audio> or <image>"}, SAID]},
        [SOUND, text(" or "), HOLE],
        ["a.wav", "a.png"],
    ),
    "text parts": ({"messages": [user(text("a"), text("b")), SAID]}, "ab", []),
    "LLaVA": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
        },
        [HOLE, text("\nwhat?")],
        ["a.png"],
    ),
    "LLaMA-Factory": (
        {"images": ["a.png"], "instruction": "what?", "output": "a cat"},
        [HOLE, text("what?")],
        ["a.png"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_puts_media_in_their_places(name: str, folder: Path) -> None:
    row, content, names = FORMS[name]
    assert shown(read(row, folder)) == (content, names)


def test_a_choice_keeps_its_media(folder: Path) -> None:
    example = read({"image": "a.png", "prompt": [ASKED], "choices": ["x", "y"], "answer": 0}, folder)
    assert example.with_choice(1).media == example.media != ()
    assert example.with_choice(1).completion == [{"role": "assistant", "content": "y"}]


def test_media_with_a_class_or_a_transcript(folder: Path) -> None:
    example = read({"image": "a.png", "label": "cat"}, folder)
    assert (example.label, len(example.media), example.text) == ("cat", 1, None)
    example = read({"audio": "a.wav", "text": "hello"}, folder)
    assert (example.text, example.media[0].kind) == ("hello", "audio")


def test_embedded_bytes_come_back_in_order(folder: Path) -> None:
    example = read({"images": [data_uri(picture(seed=1)), data_uri(picture(seed=2))], "messages": CHAT}, folder)
    assert [source.read() for source in example.media] == [encoded(picture(seed=1)), encoded(picture(seed=2))]


IMAGE = {"messages": CHAT}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"image": "none.png", **IMAGE}, "'image': .*none.png: no such file; correct the path"),
    "empty file": ({"image": "empty.png", **IMAGE}, "empty.png: the file is empty"),
    "directory": ({"image": "inner", **IMAGE}, "inner: is not a regular file"),
    "pipe": ({"image": "pipe.png", **IMAGE}, "pipe.png: is not a regular file"),
    "outside": ({"image": "../outside.png", **IMAGE}, "lies outside .*; put the file into the folder"),
    "absolute": ({"image": "/etc/hostname", **IMAGE}, "lies outside"),
    "link out": ({"image": "link.png", **IMAGE}, "lies outside"),
    "null byte": ({"image": "a\0.png", **IMAGE}, "null"),
    "https": ({"image": "https://example.org/a.png", **IMAGE}, "addresses are not read; save the file"),
    "file address": ({"image": "file:///etc/hostname", **IMAGE}, "addresses are not read"),
    "address in a part": (
        {"messages": [user({"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}), SAID]},
        r"'messages\[0\]\.content\[0\]\.image_url': http://x.org/a.png: addresses are not read",
    ),
    "data without base64": ({"image": "data:image/png,abc", **IMAGE}, "is no data URI of base64"),
    "wrong base64": ({"image": "data:image/png;base64,a!b", **IMAGE}, "not valid base64"),
    "no bytes": ({"image": "data:image/png;base64,", **IMAGE}, "no bytes"),
    "number": ({"image": 3, **IMAGE}, "'image': holds no image"),
    "blank": ({"image": " ", **IMAGE}, "'image': holds no image"),
    "string for a list": ({"images": "a.png", **IMAGE}, "'images' must be a list, not a string; write 'image'"),
    "null in a list": ({"images": ["a.png", None], **IMAGE}, r"'images\[1\]': holds no image"),
    "both": ({"image": "a.png", "images": ["b.png"], **IMAGE}, "has both 'image' and 'images'"),
    "too few": (
        {"image": "a.png", "messages": [{"role": "user", "content": "<image><image>"}, SAID]},
        r"more places for images than images \(1\)",
    ),
    "too many": (
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> x"}, SAID]},
        "1 of its images have no place; write <image>",
    ),
    "hole without image": ({"messages": [user(HOLE, text("x")), SAID]}, r"more places for images than images \(0\)"),
    "no user": ({"image": "a.png", "messages": [SAID]}, "no user message to show them in"),
    "image said": (
        {"messages": [ASKED, {"role": "assistant", "content": [{**HOLE, "path": "a.png"}]}]},
        r"'messages\[1\].content': an assistant writes text only",
    ),
    "two sources": (
        {"messages": [user({**HOLE, "path": "a.png", "image": "b.png"}), SAID]},
        r"several sources \(image, path\)",
    ),
    "unknown part": ({"messages": [user({"type": "table"}), SAID]}, "has the type 'table', and parts are of type"),
    "video part": ({"messages": [user({"type": "video", "path": "a.mp4"}), SAID]}, "videos are not supported"),
    "video": ({"videos": ["a.mp4"], **IMAGE}, "field 'videos': videos are not supported"),
    "text of a part": ({"messages": [user(HOLE, {"type": "text", "text": 3}), SAID]}, "text' must be a string"),
    "preference": (
        {"image": "a.png", "prompt": "what?", "chosen": "a", "rejected": "b"},
        "preferences with images are not supported",
    ),
    "image alone": ({"image": "a.png"}, "has 'image', but needs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_refused_in_one_line(name: str, folder: Path) -> None:
    row, words = BROKEN[name]
    with pytest.raises(InputError, match=words) as caught:
        read(row, folder)
    assert str(caught.value).startswith(f"{folder / 'rows.jsonl'}:1: ")


def test_paths_lead_from_their_file_and_stay_within_the_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture().save(tmp_path / "a.png")
    rows = tmp_path / "train" / "rows.jsonl"
    rows.write_text(json.dumps({"image": "../a.png", **IMAGE}) + "\n")
    [example] = read_examples(tmp_path)
    assert example.media[0].read() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="lies outside"):
        read_examples(rows)


def test_files_that_rows_name_are_listed_once_and_texts_are_not_parsed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture().save(tmp_path / name)
    rows = [{"text": "x"}, {"image": "b.png", **IMAGE}, {"images": ["a.png", "b.png"], **IMAGE}, {"image": "none.png"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\nno json at all\n')
    assert media_files(DataSet(path=str(tmp_path / "rows.jsonl"))) == [tmp_path / "a.png", tmp_path / "b.png"]
    assert media_files(DataSet(path=str(tmp_path / "text.jsonl"))) == []
    assert media_files(DataSet(path="some/hub-id")) == []


def test_images_embedded_in_a_parquet_file_are_read(tmp_path: Path) -> None:
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    images = [{"bytes": encoded(picture(seed=seed)), "path": None} for seed in (1, 2)]
    columns = {"image": images, "prompt": ["what?", "and?"], "completion": ["a", "b"]}
    parquet.write_table(arrow.table(columns), tmp_path / "rows.parquet")
    examples = read_examples(tmp_path / "rows.parquet")
    assert [example.media[0].read() for example in examples] == [image["bytes"] for image in images]
    assert [example.prompt for example in examples] == ["<image>what?", "<image>and?"]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_and_audio_of_the_hub_are_read_as_they_are_stored(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets  # type: ignore[import-untyped]

    sound = recording(tmp_path / "a.wav").read_bytes()
    pixels = [encoded(picture(seed=seed)) for seed in (1, 2)]
    chat = {"messages": [ASKED, SAID]}
    rows = datasets.Dataset.from_list([{"images": pixels, **chat}, {"images": pixels[:1], **chat}])
    labeled = datasets.Dataset.from_list([{"audio": sound, "label": 1}])
    kinds = {"images": datasets.List(datasets.Image())}, {"audio": datasets.Audio()}
    stored = {
        f"owner/{name}": data.cast(datasets.Features({**data.features, **kind}))
        for name, data, kind in zip(("chats", "sounds"), (rows, labeled), kinds, strict=True)
    }
    if streaming:
        stored = {name: data.to_iterable_dataset() for name, data in stored.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: stored[path])
    several, one = read_examples("owner/chats")
    assert [source.read() for source in several.media] == pixels
    assert [source.read() for source in one.media] == pixels[:1]
    [heard] = read_examples("owner/sounds")
    assert (heard.media[0].kind, heard.media[0].read(), heard.label) == ("audio", sound, 1)
