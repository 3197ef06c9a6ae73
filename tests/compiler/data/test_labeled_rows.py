"""Rows that are cut or left out are counted and said before any work."""

import json
from pathlib import Path

import pytest

from helpers.tiny_models import tiny_tokenizer
from onelayer.compiler.data.labeled_rows import labeled_rows, read_for
from onelayer.compiler.data.tokens import tokenize
from onelayer.compiler.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rows = [
        {"text": "the fox"},
        {"text": "the quick brown fox jumps"},
        {"prompt": "the quick brown fox jumps over", "completion": " the dog"},
    ]
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.jsonl").write_text(json.dumps(row))
    return [tmp_path / f"{index}.jsonl" for index in range(len(rows))]


def test_cut_and_skipped_rows_are_counted_and_said(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    length = len(tokenizer("the fox").input_ids)
    labeled = labeled_rows(files, lambda example: [tokenize(example, tokenizer, length)], length)
    assert (len(labeled.rows), labeled.cut, labeled.skipped) == (2, 2, 1)
    read_for(None, files, tokenizer, length)
    said = "2 of 3 examples are longer and are cut; 1 have no labeled token and are left out"
    assert f"--max-length {length}: {said}" in capsys.readouterr().err
    read_for(None, files[:1], tokenizer, length)
    assert capsys.readouterr().err == ""


def test_data_without_a_label_is_named_without_brackets(files: list[Path]) -> None:
    with pytest.raises(InputError, match=r"0\.jsonl, .*1\.jsonl, .*2\.jsonl: no example has a labeled token") as caught:
        read_for(None, files, tiny_tokenizer(), 1)
    assert "[" not in str(caught.value)
