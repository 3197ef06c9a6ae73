"""Data as people have it: files of many kinds, packed ones, folders in folders, Hub splits, other columns."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from onelayer.compiler import data_set
from onelayer.compiler.data.readers import check_first_rows, read_examples
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "one plus two"}, {"role": "assistant", "content": "three"}
PAIRS = [{"prompt": "one plus two", "completion": "three"}, {"prompt": "a, b", "completion": 'says "c"'}]
TABLE = 'prompt,completion,other\none plus two,three,\n"a, b","says ""c""",x\n'


def pairs_of(data: Any) -> list[tuple[Any, Any]]:
    return [(example.prompt, example.completion) for example in read_examples(data)]


FILES = {
    "list.json": json.dumps(PAIRS, indent=1),
    "lines.json": "\n".join(json.dumps(row) for row in PAIRS),
    "lines.jsonl.gz": "\n".join(json.dumps(row) for row in PAIRS),
    "table.csv": TABLE,
    "table.csv.gz": "\ufeff" + TABLE,
    "semicolons.csv": 'prompt;completion\none plus two;three\n"a, b";"says ""c"""\n',
    "tabs.tsv": 'prompt\tcompletion\none plus two\tthree\n"a, b"\t"says ""c"""\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    text = FILES[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    assert pairs_of(tmp_path / name) == [(row["prompt"], row["completion"]) for row in PAIRS]
    assert pairs_of(tmp_path) == pairs_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt,completion\nx\n", ("a.csv:2", "has 1 cells and the header 2")),
        ("a.csv", b"prompt,prompt\nx,y\n", ("a.csv:1", "header")),
        ("a.csv", b'prompt,completion\n"x,y\n', ("a.csv:", "quotes")),
        ("a.csv", b"prompt,completion\nx,\xff\n", ("a.csv:", "UTF-8")),
        ("a.csv", b"prompt,completion\n", ("a.csv", "no examples")),
        ("a.json", b'[{"text": "x"}', ("a.json", "not valid JSON", "list of objects")),
        ("a.json", b'{"data": [\n{"text": "x"}]}', ("a.json:1", "not valid JSON")),
        ("a.json", b'[{"text": "x"}, 3]', ("a.json:2", "a number")),
        ("a.jsonl.gz", b'{"text": "x"}', ("a.jsonl.gz", "cannot be read")),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], ("a.jsonl.gz", "cannot be read")),
        ("a.parquet.gz", b"", ("a.parquet.gz", "unknown kind")),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_examples(tmp_path / name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert len(read_examples(tmp_path / "a.csv")[0].text or "") == 200_000


def test_folders_in_folders_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-0.jsonl", "sub/train.jsonl", "sub/test.jsonl", "sub/.git/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "notes.md").write_text("no")
    texts = [example.text for example in read_examples(tmp_path)]
    assert texts == ["sub/test.jsonl", "sub/train.jsonl", "train-0.jsonl"]
    assert "3 files read, 2 left out (dataset_infos.json, notes.md)" in capsys.readouterr().err
    split = data_set(tmp_path, split="train")
    assert [example.text for example in read_examples(split)] == ["sub/train.jsonl", "train-0.jsonl"]
    with pytest.raises(InputError, match=r"split rain.*holds no"):
        read_examples(data_set(tmp_path, split="rain"))


ALPACA = {"instruction": "one plus two", "input": "", "output": "three"}
SHARED: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "one plus two"}, {"from": "gpt", "value": "three"}]
}
SHAPES: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (ALPACA, [USER, ASSISTANT]),
    ({**ALPACA, "input": "in words"}, [{**USER, "content": "one plus two\n\nin words"}, ASSISTANT]),
    (
        {**ALPACA, "system": "be brief", "history": [["hi", "hello"]]},
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            USER,
            ASSISTANT,
        ],
    ),
    ({"instruction": "one plus two", "context": None, "response": "three", "category": "sum"}, [USER, ASSISTANT]),
    (SHARED, [USER, ASSISTANT]),
    ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    (
        {"system": "be brief", **SHARED},
        [{"role": "system", "content": "be brief"}, USER, ASSISTANT],
    ),
    ({"prompt": "one plus two", "prompt_id": "7", "messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    ({"id": "7", "data": ["one plus two", "three"]}, [USER, ASSISTANT]),
]


@pytest.mark.parametrize(("row", "messages"), SHAPES)
def test_rows_of_other_tools_are_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    data = tmp_path / "d.json"
    data.write_text(json.dumps([row, row]))
    assert [example.messages for example in read_examples(data)] == [messages, messages]
    assert capsys.readouterr().err.count(" rows, read as messages") == 1


CHAT = [USER, ASSISTANT]
WRONG = {"role": "assistant", "content": "four"}
PREFERENCES: list[dict[str, Any]] = [
    {"instruction": "one plus two", "input": "", "chosen": "three", "rejected": "four"},
    {
        "conversations": [{"from": "human", "value": "one plus two"}],
        "chosen": {"from": "gpt", "value": "three"},
        "rejected": {"from": "gpt", "value": "four"},
    },
    {"prompt": "one plus two", "messages": CHAT, "chosen": CHAT, "rejected": [USER, WRONG], "score_chosen": 8.0},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preferences_of_other_tools(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (example,) = read_examples(tmp_path / "d.jsonl")
    assert (example.prompt, example.completion, example.rejected) == ([USER], [ASSISTANT], [WRONG])


def test_calls_and_tools_of_share_gpt(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "sum"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 7}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "nine"},
    ]
    data = tmp_path / "d.json"
    data.write_text(json.dumps([{"conversations": turns, "tools": '[{"name": "add"}]'}]))
    (example,) = read_examples(data)
    assert example.tools == [{"name": "add"}]
    assert example.messages is not None
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": 7}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ALPACA, "output": ""}, ("'output' is empty",)),
        ({**ALPACA, "input": 3}, ("'input' must be a string",)),
        ({**ALPACA, "history": ["hi"]}, ("'history'", "pairs")),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, ("'conversations[0].from' is 'narrator'", "human")),
        ({"conversations": ["x"]}, ("'conversations[0]'", "'from' and 'value'")),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, ("'conversations[0].value'", "JSON")),
        ({"question": "x", "reply": "y"}, ("'question'", "--columns prompt=question,completion=answer")),
        ({"prompt": "another", "messages": [USER, ASSISTANT]}, ("ambiguous",)),
    ],
)
def test_faults_of_other_shapes(tmp_path: Path, row: dict[str, Any], words: tuple[str, ...]) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError) as caught:
        read_examples(tmp_path / "d.jsonl")
    assert all(word in str(caught.value) for word in ("d.jsonl:1: ", *words)), caught.value


def test_columns_are_mapped_and_others_ignored(tmp_path: Path) -> None:
    data = tmp_path / "d.csv"
    data.write_text("question,answer,text\n1+1=,2,ignored\n")
    names = {"prompt": "question", "completion": "answer"}
    assert read_examples(data_set(data, columns=names)) == [Example(f"{data}:2", prompt="1+1=", completion="2")]
    with pytest.raises(InputError, match=r"d\.csv:2: has 'question', 'answer', 'text', and no 'reply'"):
        check_first_rows(data_set(data, columns={"prompt": "question", "completion": "reply"}))
    with pytest.raises(InputError, match=r"promt: unknown column, nearest is `prompt`"):
        data_set(data, columns={"promt": "question"})


def test_choices_and_labels_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('prompt,choices,answer\nx,"[""a"", ""b""]",1\n')
    (example,) = read_examples(tmp_path / "d.csv")
    assert (example.choices, example.answer) == (("a", "b"), 1)


def test_hub_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append(options)
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_examples([data_set("owner/name", split="validation", config="en"), "owner/name"])
    assert [(call["split"], call.get("name")) for call in asked] == [("validation", "en"), ("train", None)]
    with pytest.raises(InputError, match="a split is for Hub data sets and directories"):
        read_examples(data_set(__file__, split="train"))
    with pytest.raises(InputError, match="a configuration is for Hub data sets"):
        read_examples(data_set(__file__, config="en"))
