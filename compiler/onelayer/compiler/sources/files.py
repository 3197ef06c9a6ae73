"""Files of rows in, rows with their places out; and which files of a directory hold rows."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from onelayer.compiler.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
KINDS = ".jsonl, .json, .csv, .tsv, .txt or .parquet"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What Hugging Face's libraries write next to the rows.
METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
LONGEST_CELL = 2**31 - 1  # Python's own limit for a cell of a CSV file is 128 KiB

NumberedRow = tuple[int, object]  # the line or the number of a row, from 1, and the row


def kind_of(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, without `.gz`; None if it holds no rows."""
    packed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if packed else path.suffix
    return suffix if suffix in SUFFIXES and not (packed and suffix == ".parquet") else None


def data_files(directory: Path, split: str | None = None) -> tuple[list[Path], list[Path]]:
    """List the files with rows in a directory and below it, and those that are left out. Hidden ones are neither.

    With `split`, rows are in files with that word in their path, as in Hub repositories: `train-00000.parquet`.
    """
    found = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    word = None if split is None else re.compile(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])")
    rows: list[Path] = []
    others: list[Path] = []
    for path in found:
        inside = path.relative_to(directory).as_posix()
        fits = kind_of(path) is not None and path.name not in METADATA
        (rows if fits and (word is None or word.search(inside)) else others).append(path)
    return rows, others


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of one file, read piece by piece unless it is one JSON document."""
    readers = {
        ".jsonl": _json_lines,
        ".json": _json_rows,
        ".csv": _table_rows,
        ".tsv": _table_rows,
        ".txt": _paragraphs,
        ".parquet": _parquet_rows,
    }
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{path}: unknown kind of data; use {KINDS} (one JSON object per line in a .jsonl file)")
    return readers[kind](path)


def mentions(path: Path, words: Sequence[bytes]) -> bool:
    """Return whether one of some words is in a file, read piece by piece; true for a packed file."""
    if path.suffix == ".gz":
        return True
    overlap = max(map(len, words)) - 1
    tail = b""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if any(word in tail + block for word in words):
                return True
            tail = block[-overlap:]
    return False


def _opened(path: Path) -> BufferedReader:
    return BufferedReader(gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends. Only a newline ends a line, as JSON Lines requires."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not valid JSON ({error}); write one object per line, or a list into a .json file"
            ) from None
        yield number, row


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of one list, or those of JSON Lines under another name."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    text = "\n".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); write a list of objects") from None
    yield from enumerate(rows, start=1)


def _table_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a table with a header, by the line where each ends; an empty cell is absent."""
    csv.field_size_limit(LONGEST_CELL)
    line = 1
    try:
        with _opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            marks = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
            text.seek(0)
            table = csv.reader(text, delimiter=marks, strict=True)
            names = next(table, [])
            if len(set(names)) < len(names) or not all(name.strip() for name in names):
                raise InputError(f"{path}:1: needs a header with a name for each column, each once; correct it")
            for cells in table:
                line = table.line_num
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise InputError(
                        f"{path}:{line}: has {len(cells)} cells and the header {len(names)}; put texts with "
                        f"{'tabs' if marks == chr(9) else repr(marks)} into quotes"
                    )
                yield line, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not a readable table ({error}); correct the quotes") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _paragraphs(path: Path) -> Iterator[NumberedRow]:
    """Yield blocks of text between blank lines, each by its first line."""
    block: list[str] = []
    first = 0
    for number, line in _lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield first, {"text": "\n".join(block)}
            block = []
    if block:
        yield first, {"text": "\n".join(block)}


def _parquet_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield rows numbered from 1, read one batch at a time."""
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs the training extra; pip install 'onelayer[train]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None
