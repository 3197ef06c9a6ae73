"""Lists the artifacts of the store, and prunes those that no manifest reaches."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.manifest.manifest import Manifest, load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.reasons import RunRecord
from onelayer.runtime.store.prune import Pruned, prune
from onelayer.runtime.store.store import ArtifactStore


def reachable_keys(manifest: Manifest, store: ArtifactStore) -> set[str]:
    """Return the keys of the artifacts that a manifest uses now or used last."""
    planned = {step.key for step in plan(manifest, store).steps if step.key is not None}
    return planned | RunRecord.of(manifest.path, store).keys()


SECONDS_PER_DAY = 86_400


def prune_by_rules(
    older_than_days: float | None, max_total_bytes: int | None, keep: Sequence[str | Path], *, dry_run: bool = False
) -> Pruned:
    """Prune the default store by the command's rules: days, bytes, and manifests whose artifacts stay."""
    if older_than_days is None and max_total_bytes is None and not keep:
        raise InputError("say what to remove: --older-than-days, --max-size or --keep MANIFEST")
    store = ArtifactStore()
    reachable = {key for path in keep for key in reachable_keys(load_manifest(path), store)}
    return prune(
        store,
        older_than_seconds=None if older_than_days is None else older_than_days * SECONDS_PER_DAY,
        max_total_bytes=max_total_bytes,
        keep=reachable if keep else None,
        dry_run=dry_run,
    )


def list_artifacts(store: ArtifactStore) -> list[dict[str, Any]]:
    """List every artifact as a document, with its age in seconds and who used it last, as `manifest:step`."""
    users: dict[str, list[str]] = {}
    for file in sorted((store.home / "runs").glob("*.json")):
        try:
            manifest = Path(read_json(file)["manifest"])
        except (InputError, KeyError, TypeError):  # records only explain, so a damaged one is skipped
            continue
        for name, entry in RunRecord.of(manifest, store).entries.items():
            users.setdefault(entry.spec.key, []).append(f"{manifest.name}:{name}")
    now = datetime.now(UTC)
    rows = []
    for artifact in store.artifacts():
        age_seconds = (now - datetime.fromisoformat(artifact.created)).total_seconds()
        used_by = users.get(artifact.key, [])
        rows.append({**artifact.model_dump(mode="json"), "age_seconds": max(0.0, age_seconds), "used_by": used_by})
    return rows
