"""Hub data sets in, rows with their numbers out."""

import re
from collections.abc import Iterator

from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.data_set import DataSet
from onelayer.compiler.sources.files import NumberedRow

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_rows(source: DataSet, limit: int | None) -> Iterator[NumberedRow]:
    """Yield the rows of a split of a Hub data set, numbered from 1; `limit` only decides how much is fetched."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(
            f"{source.path}: no such file, and Hub data sets need the training extra; pip install 'onelayer[train]'"
        ) from None
    # Streaming fetches no more than `limit` requires, but does not use the local cache.
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    config = {} if source.config is None else {"name": source.config}
    try:
        rows = datasets.load_dataset(source.path, split=source.split or "train", streaming=streaming, **config)
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, gated, no such split, a script
        raise InputError(f"{source}: no such file, and no Hub data set that can be read ({error})") from None
    yield from enumerate(rows, start=1)
