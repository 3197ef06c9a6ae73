"""Removes artifacts of a store by age, by size, or because no given manifest reaches them."""

import time
from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.results import Result
from onelayer.compiler.storage.files import directory_bytes
from onelayer.runtime.store.record import METADATA
from onelayer.runtime.store.store import ArtifactStore, remove_artifact


class PrunedArtifact(Result):
    """One artifact that was removed or would be: `kind` is None for an unfinished one; seconds since its last use."""

    key: str
    kind: str | None
    size_bytes: int
    unused_seconds: float


class Pruned(Result):
    """Keys that were removed (or would be, in a dry run), keys that were in use and stayed, and the bytes freed."""

    removed: list[str]
    in_use: list[str]
    freed_bytes: int
    dry_run: bool
    artifacts: list[PrunedArtifact]


class _Entry(Result):
    """One folder of the store: a finished artifact, or the remains of an interrupted one."""

    path: Path
    key: str
    size_bytes: int
    last_use: float  # seconds since the epoch


def prune(
    store: ArtifactStore,
    *,
    older_than_seconds: float | None = None,
    max_total_bytes: int | None = None,
    keep: set[str] | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove every artifact that one of the given rules matches. One that a run makes or uses right now always stays.

    `older_than_seconds` counts from the last use. `max_total_bytes` removes the least recently used first until the
    store fits. `keep` is a set of keys; every other artifact is removed.
    """
    entries = sorted(_entries(store), key=lambda entry: entry.last_use)
    chosen: dict[Path, _Entry] = {}
    now = time.time()
    for entry in entries:
        old = older_than_seconds is not None and now - entry.last_use > older_than_seconds
        if old or (keep is not None and entry.key not in keep):
            chosen[entry.path] = entry
    if max_total_bytes is not None:
        total_bytes = sum(entry.size_bytes for entry in entries if entry.path not in chosen)
        for entry in entries:
            if total_bytes > max_total_bytes and entry.path not in chosen:
                chosen[entry.path] = entry
                total_bytes -= entry.size_bytes
    removed: list[_Entry] = []
    listed: list[PrunedArtifact] = []
    in_use: list[str] = []
    for entry in chosen.values():
        with store.claim(entry.key) as free:
            if not free:
                in_use.append(entry.key)
                continue
            listed.append(_listed(store, entry, now))
            if not dry_run:
                remove_artifact(entry.path)
            removed.append(entry)
    return Pruned(
        removed=[entry.key for entry in removed],
        in_use=in_use,
        freed_bytes=sum(entry.size_bytes for entry in removed),
        dry_run=dry_run,
        artifacts=listed,
    )


def _listed(store: ArtifactStore, entry: _Entry, now: float) -> PrunedArtifact:
    try:
        artifact = None if entry.path.name.startswith(".") else store.find(entry.key)
    except InputError:  # its record is damaged
        artifact = None
    kind = None if artifact is None else artifact.kind
    unused_seconds = max(0.0, now - entry.last_use)
    return PrunedArtifact(key=entry.key, kind=kind, size_bytes=entry.size_bytes, unused_seconds=unused_seconds)


def _entries(store: ArtifactStore) -> list[_Entry]:
    """List every artifact folder of the store, unfinished ones too."""
    entries = []
    for path in store.root.iterdir() if store.root.is_dir() else ():
        unfinished = path.name.startswith(".") and path.name.endswith(".partial")
        if not path.is_dir() or (path.name.startswith(".") and not unfinished):
            continue
        mark = path / METADATA if not unfinished and (path / METADATA).exists() else path
        key = path.name.removeprefix(".").removesuffix(".partial")
        size_bytes = directory_bytes(path)
        entries.append(_Entry(path=path, key=key, size_bytes=size_bytes, last_use=mark.stat().st_mtime))
    return entries
