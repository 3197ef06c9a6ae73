"""Hub data sets in, rows with their numbers out."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    if any(_holds_media(feature) for feature in (getattr(rows, "features", None) or {}).values()):
        # The format of Arrow leaves bytes as they are stored; others decode each image or recording to an object.
        rows = (row for table in rows.with_format("arrow") for row in table.to_pylist())
    yield from enumerate(rows, start=1)


def _holds_media(feature: Any) -> bool:
    """Return whether a column, or a part of it, is of images or audio."""
    import datasets

    if isinstance(feature, Mapping):
        return any(_holds_media(part) for part in feature.values())
    inner = getattr(feature, "feature", None)  # of lists
    return isinstance(feature, datasets.Image | datasets.Audio) or (inner is not None and _holds_media(inner))
