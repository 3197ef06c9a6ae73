"""Users' data in, checked examples out: .jsonl, .txt and .parquet files, directories of them, Hub data sets.

Calibration, training and evaluation share this file, so that all three read the same text. The next step is `tokenize`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from onelayer.compiler.data.rows import Example, example_from_row, of_one_kind
from onelayer.compiler.errors import InputError

SUFFIXES = (".jsonl", ".txt", ".parquet")
KINDS = ".jsonl, .txt or .parquet"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_examples(data: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Example]:
    """Read the examples of `data` in order: a file, a directory, a Hub id, or a sequence of these.

    Reads no more than the first `limit` examples. Raises `InputError` for anything that is not a usable example.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the number of examples must be at least 1, not {limit}")
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not sources:
        raise InputError(f"no data given; name a {KINDS} file, a directory of them, or a Hub id")
    examples = (example for source in sources for example in _examples(source, limit))
    return list(islice(of_one_kind(examples), limit))


def _examples(data: str | Path, limit: int | None) -> Iterator[Example]:
    """Yield the examples of one source; `limit` only decides how much of a remote data set is fetched."""
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] != ".")
        if not files:
            raise InputError(f"{path}: no examples, the directory holds no {KINDS} file")
        for file in files:
            yield from _file_examples(file)
    elif path.exists():
        yield from _file_examples(path)
    elif isinstance(data, str) and HUB_ID.fullmatch(data) and path.suffix not in SUFFIXES:
        yield from _hub_examples(data, limit)
    else:
        raise InputError(f"{path}: no such file; name a {KINDS} file, a directory of them, or a Hub id (owner/name)")


def _file_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of one file, at least one."""
    readers = {".jsonl": _json_lines, ".txt": _paragraphs, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path}: unknown kind of data; use {KINDS} (one JSON object per line in a .jsonl file)")
    empty = True
    for example in readers[path.suffix](path):
        empty = False
        yield example
    if empty:
        raise InputError(f"{path}: no examples, the file is empty; add some or leave it out")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends. Only a newline ends a line, as JSON Lines requires."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _json_lines(path: Path) -> Iterator[Example]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not valid JSON ({error}); write one object per line") from None
        yield example_from_row(row, source)


def _paragraphs(path: Path) -> Iterator[Example]:
    """Yield blocks of text between blank lines, each named by its first line."""
    block: list[str] = []
    first = 0
    for number, line in _lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield Example(f"{path}:{first}", text="\n".join(block))
            block = []
    if block:
        yield Example(f"{path}:{first}", text="\n".join(block))


def _parquet_rows(path: Path) -> Iterator[Example]:
    """Yield rows numbered from 1, read one batch at a time."""
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs the training extra; pip install 'onelayer[train]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield example_from_row(row, f"{path}:{number}")
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _hub_examples(name: str, limit: int | None) -> Iterator[Example]:
    """Yield the `train` split of a Hub data set, rows numbered from 1."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(
            f"{name}: no such file, and Hub data sets need the training extra; pip install 'onelayer[train]'"
        ) from None
    # Streaming fetches no more than `limit` requires, but does not use the local cache.
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(name, split="train", streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, gated, no such split, a script
        raise InputError(f"{name}: no such file, and no Hub data set that can be read ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield example_from_row(row, f"{name}:{number}")
