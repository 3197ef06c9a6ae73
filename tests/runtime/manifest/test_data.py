"""Data sources of a manifest: what is written besides a path, and the first rows."""

from pathlib import Path

import pytest

from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("{path: sql.csv, colums: {text: x}}", "colums: unknown field, nearest is `columns`"),
        ("{path: sql.csv, columns: {txt: x}}", "txt: unknown column, nearest is `text`"),
        ("{path: sql.csv, columns: {text: answr}}", "has 'question', 'answer', and no 'answr'"),
        ("sql.csv", "has 'question', 'answer', but needs 'text'"),
        ("{path: sql.csv, split: dev}", "a split is for Hub data sets and directories"),
        ("[{split: dev}]", "write a path, or a mapping with `path`"),
    ],
)
def test_the_first_rows_are_checked_before_anything_runs(tmp_path: Path, data: str, fault: str) -> None:
    (tmp_path / "sql.csv").write_text("question,answer\nx,y\n")
    (tmp_path / "model").mkdir()
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"version: 1\nmodel: {{path: model}}\ntasks: {{sql: {{train: {data}}}}}\n")
    with pytest.raises(InputError) as caught:
        load_manifest(manifest)
    assert "tasks.sql.train" in str(caught.value)
    assert fault in str(caught.value)
