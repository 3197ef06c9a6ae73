"""Users' data in, checked examples out: files, directories of them, Hub data sets, in our columns or in known others.

Calibration, training and evaluation share this file, so that all three read the same text. The next step is `tokenize`.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from onelayer.compiler.data.rows import Example, example_from_row, of_one_kind
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.media.sources import Folder
from onelayer.compiler.sources.data_set import DataSet, DataSource, data_sets
from onelayer.compiler.sources.files import KINDS, NumberedRow, data_files, file_rows, kind_of, mentions
from onelayer.compiler.sources.hub import HUB_ID, hub_rows
from onelayer.compiler.sources.shapes import own_row, renamed

FIRST_ROWS = 8
MEDIA_WORDS = (b"image", b"audio")  # in the names of columns and in the types of parts


def read_examples(data: DataSource, limit: int | None = None) -> list[Example]:
    """Read the examples of `data` in order: a file, a directory, a Hub id, or a sequence of these.

    Reads no more than the first `limit` examples. Raises `InputError` for anything that is not a usable example.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the number of examples must be at least 1, not {limit}")
    sources = data_sets(data)
    if not sources:
        raise InputError(f"no data given; name a {KINDS} file, a directory of them, or a Hub id")
    examples = (example for source in sources for example in _examples(source, limit, said=set()))
    return list(islice(of_one_kind(examples), limit))


def check_first_rows(source: DataSet) -> None:
    """Raise `InputError` if a local source does not exist, or its first rows are no examples. Reads no Hub data set."""
    if Path(source.path).exists():
        list(islice(_examples(source, FIRST_ROWS, said=None), FIRST_ROWS))


def media_files(source: DataSet) -> list[Path]:
    """List the files of images and audio that the rows of a local source name, each once, in order of their paths.

    Rows that are no examples name none. Only files that mention images or audio are parsed.
    """
    path = Path(source.path)
    if path.is_dir():
        named = [(file, Folder(file.parent, path)) for file in data_files(path, source.split)[0]]
    else:
        named = [(path, Folder(path.parent, path.parent))] if path.is_file() and kind_of(path) is not None else []
    found: set[Path] = set()
    for file, folder in named:
        if not mentions(file, MEDIA_WORDS):
            continue
        for number, row in file_rows(file):
            with suppress(InputError):
                own, _ = own_row(renamed(row, source.columns, str(file)), str(file))
                example = example_from_row(own, f"{file}:{number}", folder)
                found |= {medium.path for medium in example.media if medium.path is not None}
    return sorted(found)


def _examples(source: DataSet, limit: int | None, said: set[str] | None) -> Iterator[Example]:
    """Yield the examples of one source. A notice names what it is read as, once; without `said` there is none."""
    for place, rows, folder in _places(source, limit, quiet=said is None):
        empty = True
        for number, row in rows:
            empty = False
            where = f"{place}:{number}"
            own, shape = own_row(renamed(row, source.columns, where), where)
            if shape is not None and said is not None and shape not in said:
                said.add(shape)
                notice(f"{source}: {shape} rows, read as messages")
            yield example_from_row(own, where, folder)
        if empty:
            raise InputError(f"{place}: no examples, the file is empty; add some or leave it out")


def _places(
    source: DataSet, limit: int | None, quiet: bool
) -> Iterator[tuple[str, Iterator[NumberedRow], Folder | None]]:
    """Yield the names of files (or of the Hub data set), their rows, and the folder of the media of these."""
    path = Path(source.path)
    if path.exists() and source.config is not None:
        raise InputError(f"{source}: a configuration is for Hub data sets; leave it out")
    if path.is_dir():
        files, others = data_files(path, source.split)
        if not files:
            raise InputError(f"{source}: no examples, the directory holds no {KINDS} file")
        if others and not quiet:
            names = ", ".join(file.relative_to(path).as_posix() for file in others[:5])
            notice(f"{source}: {len(files)} files read, {len(others)} left out ({names}{', ...' * (len(others) > 5)})")
        for file in files:
            yield str(file), file_rows(file), Folder(file.parent, path)
    elif path.exists():
        if source.split is not None:
            raise InputError(f"{source}: a split is for Hub data sets and directories; leave it out")
        yield source.path, file_rows(path), Folder(path.parent, path.parent)
    elif HUB_ID.fullmatch(source.path) and kind_of(path) is None:
        yield source.path, hub_rows(source, limit), None
    else:
        raise InputError(f"{path}: no such file; name a {KINDS} file, a directory of them, or a Hub id (owner/name)")
