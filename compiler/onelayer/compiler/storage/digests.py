"""SHA-256 of files, remembered across runs: a 100 GB checkpoint is hashed once, not at every command."""

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from onelayer.compiler.storage.files import BUFFER_BYTES, onelayer_home, write_json
from onelayer.compiler.storage.stamps import stamp_of

# Below this a file is hashed every time: cheaper than looking it up.
MEMO_FLOOR_BYTES = 1 << 20
# A file changed this recently could change again within the same time stamp, so its digest is not remembered.
RACY_SECONDS = 2.0
# The most that a digest waits for its place in the memo; writing one takes milliseconds.
LOCK_SECONDS = 10.0


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
    if known is not None and known["stamp"] == stamp:
        return str(known["sha256"])
    digest = sha256_file(real)
    settled = time.time() - max(status.st_mtime, status.st_ctime) > RACY_SECONDS
    if settled and list(stamp_of(real.stat())) == stamp:
        _remember(str(real), {"stamp": stamp, "sha256": digest})
    return digest


def _memo_path() -> Path:
    return onelayer_home() / "digests.json"


def _read_memo() -> dict[str, dict[str, object]]:
    """Return the entries by path; what is absent or damaged only costs time, so it is left out."""
    try:
        memo = json.loads(_memo_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {path: entry for path, entry in memo.items() if _is_entry(entry)} if isinstance(memo, dict) else {}


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"stamp", "sha256"}:
        return False
    stamp, digest = value["stamp"], value["sha256"]
    counts = isinstance(stamp, list) and all(isinstance(part, int) for part in stamp)
    return counts and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _remember(path: str, entry: dict[str, object]) -> None:
    """Add an entry. Commands that run at the same time wait for each other, so that each keeps those of the others."""
    from filelock import FileLock

    file = _memo_path()
    # A home that cannot be written or locked, or a path that is no UTF-8, costs a second hashing, nothing else.
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=LOCK_SECONDS):
            memo = {name: value for name, value in _read_memo().items() if os.path.exists(name)}
            write_json(file, {**memo, path: entry})


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
