"""The content-addressed store of finished steps: each artifact is made once, and is either complete or absent.

`<home>/artifacts/<key>/` holds `payload/` and `artifact.json`, which is written last. The folder appears by one rename.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from onelayer.compiler.documents import checked_document
from onelayer.compiler.storage.digests import file_digest, sha256_file, sha256_json
from onelayer.compiler.storage.files import directory_bytes, onelayer_home, publish_directory, read_json, write_json
from onelayer.compiler.storage.work_directory import WorkKind, begin
from onelayer.runtime.store.locks import ArtifactLocks
from onelayer.runtime.store.record import METADATA, Artifact, Fault, Notify, StepSpec, library_versions, silent

# Next to an unfinished payload: what it was begun with in addition to its key, mainly the versions of libraries.
BEGUN_WITH = "begun.json"
ATTEMPT = WorkKind("partial", finished="*", record=BEGUN_WITH, refused=None)
# Next to a payload that is complete but not yet described: what making it returned, and how long that took.
MADE = "made.json"


class ArtifactStore:
    """Artifacts below one folder, by default `$ONELAYER_HOME/artifacts`; safe for several processes at once."""

    def __init__(self, home: str | Path | None = None) -> None:
        self.home = Path(home) if home is not None else onelayer_home()
        self.root = self.home / "artifacts"
        self._locks = ArtifactLocks(self.root)

    def payload(self, key: str) -> Path:
        """Return the folder of an artifact's files."""
        return self.root / key / "payload"

    def find(self, key: str) -> Artifact | None:
        """Return the finished artifact of a key, if there is one, without checking its files."""
        if not (self.root / key / METADATA).is_file():
            return None
        return self._read(key)

    def _read(self, key: str) -> Artifact:
        file = self.root / key / METADATA
        return checked_document(Artifact, read_json(file), file, f"remove the folder {file.parent}")

    def damage(self, artifact: Artifact, digest: Callable[[Path], str] = file_digest) -> str | None:
        """Name the first file that is missing, added or changed, with what is wrong; None for an intact artifact.

        With the default `digest` a large file is read only if its size, time stamp or inode moved.
        """
        return next((f"{fault.file} {fault.problem}" for fault in self._faults(artifact, digest)), None)

    def _faults(self, artifact: Artifact, digest: Callable[[Path], str]) -> Iterator[Fault]:
        payload = self.payload(artifact.key)
        present = set(_files(payload))
        for file in sorted(present | set(artifact.files)):
            if file not in artifact.files:
                problem = "does not belong to the artifact"
            elif file not in present:
                problem = "is missing"
            elif digest(payload / file) != artifact.files[file]:
                problem = "changed since it was written"
            else:
                continue
            yield Fault(key=artifact.key, kind=artifact.kind, file=file, problem=problem)

    def ensure(
        self,
        spec: StepSpec,
        make: Callable[[Path], Mapping[str, Any]],
        digest: Callable[[Path], str] | None = None,
        *,
        resumable: bool = False,
        begun_with: Mapping[str, Any] | None = None,
        notify: Notify = silent,
        wait: bool = True,
    ) -> tuple[Artifact, bool]:
        """Return the artifact of `spec`, and whether it had to be made: `make(folder)` creates and fills a folder.

        If several callers have the same spec, one makes it and the others wait; a caller that does not `wait` gets a
        `BusyError`. With `resumable`, the remains of an
        interrupted attempt stay next to that folder for the next attempt, if both began with the same libraries and the
        same `begun_with`. Those are facts that change no result, only how a step resumes. `digest` identifies a payload
        with files that differ from run to run (reports); by default all files count.
        """
        with self._locks.making(spec.key, notify, wait=wait):
            found = self.find(spec.key)
            if found is not None:
                if self.damage(found) is None:
                    return found, False
                remove_artifact(self.root / spec.key)
            partial = ATTEMPT.path(self.root / spec.key)
            begun = {"versions": library_versions(), **(begun_with or {})}
            begin(partial, ATTEMPT, begun, resumable)
            try:
                return self._fill(spec, partial, make, digest), True
            except BaseException:
                if not resumable:
                    shutil.rmtree(partial, ignore_errors=True)
                raise

    def _fill(
        self,
        spec: StepSpec,
        partial: Path,
        make: Callable[[Path], Mapping[str, Any]],
        digest: Callable[[Path], str] | None,
    ) -> Artifact:
        """Run `make` in a temporary folder, describe the result, and publish it under its key."""
        payload = partial / "payload"
        document, seconds = _made(partial, payload, make)
        files = {file: file_digest(payload / file) for file in _files(payload)}
        assert files, f"step {spec.kind} wrote no file"
        costs = document.get("report") or document
        artifact = Artifact(
            key=spec.key,
            **spec.model_dump(mode="json"),
            digest=digest(payload) if digest is not None else sha256_json(files),
            files=files,
            total_bytes=directory_bytes(payload),
            seconds=round(seconds, 3),
            peak_device_bytes=costs.get("peak_device_bytes"),
            promised_bytes=costs.get("largest_unit_bytes", 0) + costs.get("workspace_bytes", 0) or None,
            peak_host_bytes=costs.get("peak_host_bytes"),
            versions=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for leftover in partial.iterdir():
            if leftover.is_dir() and leftover != payload:
                shutil.rmtree(leftover)
            elif leftover.is_file():
                leftover.unlink()
        write_json(partial / METADATA, artifact.model_dump(mode="json"))
        publish_directory(partial, self.root / spec.key)
        return artifact

    @contextlib.contextmanager
    def use(self, key: str) -> Iterator[Path]:
        """Yield an artifact's payload and keep `prune` away from it; many runs may use it at once."""
        with self._locks.use(key):
            yield self.payload(key)

    def claim(self, key: str) -> contextlib.AbstractContextManager[bool]:
        """Yield whether an artifact is free to remove: no run makes or uses it, and none can start until the end."""
        return self._locks.claim(key)

    def artifacts(self) -> list[Artifact]:
        """List every finished artifact, oldest first."""
        keys = [path.parent.name for path in self.root.glob(f"[!.]*/{METADATA}")]
        return sorted((self._read(key) for key in keys), key=lambda artifact: (artifact.created, artifact.key))

    def verify(self) -> list[Fault]:
        """Read every byte of every artifact again; return a fault per file that changed since it was written."""
        return [fault for artifact in self.artifacts() for fault in self._faults(artifact, sha256_file)]


def remove_artifact(folder: Path) -> None:
    """Remove a folder of the store, metadata first, so that a half-removed one no longer counts as an artifact."""
    (folder / METADATA).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _made(partial: Path, payload: Path, make: Callable[[Path], Mapping[str, Any]]) -> tuple[Mapping[str, Any], float]:
    """Return what making the payload returned, and its seconds. An earlier attempt may have made it already.

    A payload without such a record was left by a failing step, and is removed before the next attempt.
    """
    if not (partial / MADE).is_file():
        if payload.exists():
            shutil.rmtree(payload)
        started = time.perf_counter()
        document = make(payload)
        write_json(partial / MADE, {"document": dict(document), "seconds": time.perf_counter() - started})
    made = read_json(partial / MADE)
    return made["document"], made["seconds"]


def _files(payload: Path) -> list[str]:
    """List the relative names of all files below a folder, with forward slashes."""
    return sorted(str(PurePosixPath(path.relative_to(payload))) for path in payload.rglob("*") if path.is_file())
