"""SHA-256 of files, remembered across runs: a 100 GB checkpoint is hashed once, not at every command."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from onelayer.compiler.storage.files import BUFFER_BYTES, onelayer_home, write_json
from onelayer.compiler.storage.stamps import stamp_of

# Below this a file is hashed every time: cheaper than looking it up.
MEMO_FLOOR_BYTES = 1 << 20
# A file changed this recently could change again within the same time stamp, so its digest is not remembered.
RACY_SECONDS = 2.0


def file_digest(path: Path) -> str:
    """Return the hex SHA-256 of a file, from memory if nothing changed it: see `stamps.py`.

    A time stamp alone never changes the answer: it only decides whether the bytes are read again. No name is taken for
    a digest, not even that of a blob in the Hub's cache.
    """
    real = path.resolve()
    status = real.stat()
    if status.st_size < MEMO_FLOOR_BYTES:
        return sha256_file(real)
    stamp = list(stamp_of(status))
    known = _read_memo().get(str(real))
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return str(known["sha256"])
    digest = sha256_file(real)
    settled = time.time() - max(status.st_mtime, status.st_ctime) > RACY_SECONDS
    if settled and list(stamp_of(real.stat())) == stamp:
        _remember(str(real), {"stamp": stamp, "sha256": digest})
    return digest


def _memo_path() -> Path:
    return onelayer_home() / "digests.json"


def _read_memo() -> dict[str, dict[str, object]]:
    try:
        memo = json.loads(_memo_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: the memo only saves time, so it starts empty
        return {}
    return memo if isinstance(memo, dict) else {}


def _remember(path: str, entry: dict[str, object]) -> None:
    memo = {name: value for name, value in _read_memo().items() if os.path.exists(name)}
    memo[path] = entry
    with contextlib.suppress(OSError):  # a read-only home costs a second hashing, nothing else
        _memo_path().parent.mkdir(parents=True, exist_ok=True)
        write_json(_memo_path(), memo)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(document: Any) -> str:
    """Return the hex SHA-256 of a JSON-plain value, independent of the order of its keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
