"""Reading data: every form and container is accepted, and every fault names its file, line and field."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import InputError

USER = {"role": "user", "content": "name a colour"}
ASSISTANT = {"role": "assistant", "content": "blue"}


def write(path: Path, *rows: Any) -> Path:
    """One line per row: strings as they are, everything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def fault(data: Any, *words: str) -> None:
    """Reading `data` stops with one line that holds all of `words`."""
    with pytest.raises(InputError) as caught:
        read_examples(data)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_jsonl_takes_every_form_and_skips_blank_lines(tmp_path: Path) -> None:
    data = write(
        tmp_path / "d.jsonl",
        {"text": "one", "id": 7, "messages": None},
        "",
        {"prompt": "1+1=", "completion": "2"},
        "   ",
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT], "tools": []},
    )
    assert read_examples(data) == [
        Example(f"{data}:1", text="one"),
        Example(f"{data}:3", prompt="1+1=", completion="2"),
        Example(f"{data}:5", messages=[{"role": "system", "content": ""}, USER, ASSISTANT]),
        Example(f"{data}:6", prompt=[USER], completion=[ASSISTANT]),
    ]


def test_jsonl_with_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "l\\u2028s"}\r\n{"text": "a\xe2\x80\xa8b"}')
    assert [example.text for example in read_examples(data)] == ["one", "l\u2028s", "a\u2028b"]


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    data = tmp_path / "d.txt"
    data.write_bytes(b"\xef\xbb\xbf\r\none\r\n two\r\n \r\n\r\nthree\n")
    assert read_examples(str(data)) == [Example(f"{data}:2", text="one\n two"), Example(f"{data}:6", text="three")]


def test_parquet_directory_and_sequence(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "p1", "messages": None}, {"text": None, "messages": [USER, {**ASSISTANT, "name": "a"}]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", {"text": "j"})
    (tmp_path / "c.txt").write_text("t")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    examples = read_examples(tmp_path)
    assert [example.source.rpartition("/")[2] for example in examples] == [
        "a.jsonl:1",
        "b.parquet:1",
        "b.parquet:2",
        "c.txt:1",
    ]
    assert examples[2].messages == [USER, {**ASSISTANT, "name": "a"}]  # no "name": null from the first message
    assert read_examples([tmp_path / "c.txt", str(tmp_path / "a.jsonl")]) == [examples[3], examples[0]]


def test_limit_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"text": "one"}, {"text": "two"}, "broken")
    assert len(read_examples(data, limit=2)) == 2
    assert len(read_examples([data, tmp_path / "missing.jsonl"], limit=2)) == 2
    with pytest.raises(InputError, match="at least 1"):
        read_examples(data, limit=0)


LONG_INTEGER = "9" * 5000
DEEP = "[" * 100_000
ROW_FAULTS: list[tuple[Any, tuple[str, ...]]] = [
    ('{"text": "one"', ("not valid JSON", "one object per line")),
    (f'{{"text": {LONG_INTEGER}}}', ("not valid JSON",)),
    (DEEP, ("not valid JSON",)),
    ('["text"]', ("must be an object", "a list")),
    ("null", ("must be an object", "null")),
    ({}, ("no fields", "'text'")),
    ({"content": "x"}, ("'content'", "needs 'text'", "rename")),
    ({"text": None}, ("needs 'text'",)),
    ({"text": "x", "messages": [USER, ASSISTANT]}, ("ambiguous", "text and messages")),
    ({"text": "x", "prompt": "y"}, ("ambiguous", "prompt+completion")),
    ({"text": 3}, ("'text'", "must be a string", "a number")),
    ({"text": " \n"}, ("'text' is empty", "remove")),
    ('{"text": "\\ud800"}', ("'text'", "surrogate")),
    ({"prompt": "x"}, ("'prompt' needs a field 'completion'",)),
    ({"completion": "x"}, ("'completion' needs a field 'prompt'", "use 'text'")),
    ({"prompt": "", "completion": "x"}, ("'prompt' is empty", "use 'text'")),
    ({"prompt": "x", "completion": ""}, ("'completion' is empty",)),
    ({"prompt": "x", "completion": 2}, ("'completion' must be a string",)),
    ({"prompt": [USER], "completion": "x"}, ("a list and 'completion' is a string", "make both")),
    ({"prompt": [USER], "completion": [USER]}, ("'completion[0].role' is 'user'",)),
    ({"prompt": [], "completion": [ASSISTANT]}, ("'prompt'", "an empty list")),
    ({"messages": "x"}, ("'messages'", "a string")),
    ({"messages": ["x"]}, ("'messages[0]'", "an object")),
    ({"messages": [{"content": "x"}]}, ("'messages[0].role'", "null")),
    ({"messages": [USER, {"role": "assistant"}]}, ("'messages[1].content'", "null")),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, ("'messages[1].content' is empty",)),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
        ("more places for images than images (0)", "add them"),
    ),
    ({"messages": [{"role": "user", "content": ["a", "b"]}]}, ("'messages[0].content'", "a list", "join its parts")),
    ({"messages": [USER]}, ("no assistant turn",)),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, ("no assistant turn",)),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, ("'messages[1].weight' is 0.5", "0 or 1")),
    ({"messages": [{**USER, "role": "human"}, ASSISTANT]}, ("'messages[0].role' is 'human'", "'user'")),
    ({"messages": [USER, {**ASSISTANT, "role": "Assistent"}]}, ("'messages[1].role' is 'Assistent'", "'assistant'")),
    ({"prompt": [USER], "completion": [{**ASSISTANT, "weight": 0}]}, ("'completion'", "weight 0")),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, ("'messages[1].tool_calls[0]'", "'name'")),
    ({"messages": [USER, {**ASSISTANT, "function_call": {}, "tools": [1]}]}, ("'messages[1].tools' is not supported",)),
    ({"messages": [USER, ASSISTANT], "tools": [1]}, ("'tools' must be a list of JSON schemas",)),
    ({"text": "x", "tools": [{}]}, ("'tools' needs 'messages'",)),
    ({"text": "x", "images": ["a.png"]}, ("'images[0]'", "a.png", "no such file")),
]


@pytest.mark.parametrize(("row", "words"), ROW_FAULTS)
def test_row_faults_name_file_line_and_field(row: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"text": "fine"}, "", row)
    fault(data, f"{data}:3: ", *words)


def test_file_faults(tmp_path: Path) -> None:
    fault(write(tmp_path / "e.jsonl", "", " "), "e.jsonl", "no examples")
    fault(write(tmp_path / "e.txt"), "e.txt", "no examples")
    fault([], "no data")
    (tmp_path / "empty").mkdir()
    fault(tmp_path / "empty", "no examples", ".jsonl")
    (tmp_path / "d.json").write_text("[]")
    fault(tmp_path / "d.json", "d.json", "no examples")
    (tmp_path / "d.yaml").write_text("[]")
    fault(tmp_path / "d.yaml", "d.yaml", ".jsonl")
    (tmp_path / "l.txt").write_bytes(b"fine\n\nna\xefve\n")
    fault(tmp_path / "l.txt", "l.txt:3", "UTF-8")
    (tmp_path / "u.jsonl").write_text('{"text": "x"}', encoding="utf-16")
    fault(tmp_path / "u.jsonl", "u.jsonl:1", "UTF-8")
    fault(tmp_path / "missing.jsonl", "missing.jsonl", "no such file")
    fault("missing.jsonl", "no such file")
    fault("owner/name.jsonl", "no such file")


def test_parquet_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.parquet", "PAR0")
    fault(data, "d.parquet", "not a readable Parquet file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fault(data, "d.parquet", "pip install 'onelayer[train]'")


def test_hub_data_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(name: str, **options: Any) -> None:
        raise ConnectionError(f"cannot reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fault("owner/some-set", "owner/some-set", "no Hub data set", "cannot reach")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: [{"text": "x"}, {"text": ""}])
    assert read_examples("owner/some-set", limit=1) == [Example("owner/some-set:1", text="x")]
    fault("owner/some-set", "owner/some-set:2", "empty")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fault("owner/some-set", "pip install 'onelayer[train]'")
