"""The records of an artifact: the spec that names it, the metadata that describes it, and its faults."""

import contextlib
from collections.abc import Callable
from typing import Any

from onelayer.compiler.results import Result
from onelayer.compiler.storage.digests import sha256_json

METADATA = "artifact.json"
LIBRARIES = ("onelayer", "torch", "transformers", "peft", "trl", "safetensors")

Notify = Callable[[str], None]


def silent(message: str) -> None:
    """Say nothing; the default `Notify`."""


class Artifact(Result):
    """The content of `artifact.json`: one finished step.

    `digest` identifies what the payload computes and is what later steps build their keys from; `files` maps every
    payload file to its SHA-256. Times and peaks are those of the run that made it. `promised_bytes` is the peak that a
    streamed pass promised: its largest unit plus its workspace.
    """

    format_version: int = 1
    key: str
    kind: str
    step_version: int
    fields: dict[str, Any]
    inputs: dict[str, str]
    digest: str
    files: dict[str, str]
    total_bytes: int
    seconds: float
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None
    promised_bytes: int | None = None
    versions: dict[str, str]
    created: str


class StepSpec(Result):
    """Everything that decides a step's result; the key is its hash. `inputs` maps each input's role to its digest."""

    kind: str
    step_version: int
    fields: dict[str, Any]
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        """The artifact's name in the store."""
        return sha256_json(self.model_dump(mode="json"))


class Fault(Result):
    """One damaged file of one artifact."""

    key: str
    kind: str
    file: str
    problem: str


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries a result may depend on; they are recorded and never part of a key."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
