"""Explains why a step must run: how its inputs and settings differ from those of the last run, kept in the store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onelayer.compiler.errors import InputError
from onelayer.compiler.results import Result
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime.pipeline.step import Step
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore

UNCHANGED = "made before from the same inputs and settings"


class _Entry(Result):
    """The origin of one step's result; `sources` are the paths of the digests in `spec.inputs`."""

    spec: StepSpec
    sources: dict[str, str]


class RunRecord:
    """The last finished state of each step of one manifest. It only explains: losing it never changes what runs."""

    def __init__(self, file: Path, manifest: Path, entries: dict[str, _Entry]) -> None:
        self._file = file
        self._manifest = manifest
        self._entries = entries

    @classmethod
    def of(cls, manifest: Path, store: ArtifactStore) -> "RunRecord":
        """Read the record of the manifest at a path; empty if there is no readable one."""
        file = store.home / "runs" / f"{sha256_json(str(manifest))[:32]}.json"
        try:
            document = read_json(file)
            entries = {name: _Entry.model_validate(entry) for name, entry in document["steps"].items()}
        except (InputError, ValidationError, KeyError, TypeError, AttributeError):
            entries = {}
        return cls(file, manifest, entries)

    def get(self, step_name: str) -> _Entry | None:
        """Return what a step was made from last."""
        return self._entries.get(step_name)

    @property
    def entries(self) -> Mapping[str, "_Entry"]:
        """The specs and sources that every step was made from last, by name."""
        return self._entries

    def keys(self) -> set[str]:
        """Return the keys of all artifacts that the manifest used last."""
        return {entry.spec.key for entry in self._entries.values()}

    def remember(self, step: Step, spec: StepSpec) -> None:
        """Record immediately that a step is up to date with `spec`: the next step may be interrupted."""
        from filelock import FileLock

        sources = {role: source.text for role, source in step.sources.items()}
        self._entries[step.name] = _Entry(spec=spec, sources=sources)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        steps = {name: entry.model_dump(mode="json") for name, entry in self._entries.items()}
        with FileLock(self._file.with_suffix(".lock")):  # two concurrent runs of one manifest write the same file
            write_json(self._file, {"manifest": str(self._manifest), "steps": steps})


def reason_to_run(step: Step, spec: StepSpec, record: RunRecord, waiting: Mapping[str, str], damage: str | None) -> str:
    """Explain why a step must run: what is damaged, what changed since last time, and what it waits for."""
    if damage is not None:
        return f"artifact damaged: {damage}"
    last = record.get(step.name)
    changes = ["never ran"] if last is None else _changes(step, spec, last, waiting)
    if waiting:
        changes.append(f"after {', '.join(waiting.values())}")
    return "; ".join(changes) or "its artifact is no longer in the store"


def _changes(step: Step, spec: StepSpec, last: _Entry, waiting: Mapping[str, str]) -> list[str]:
    """List the differences between what a step was made from and what it would be made from now."""
    changes = []
    if spec.step_version != last.spec.step_version:
        changes.append(f"step version changed {last.spec.step_version} -> {spec.step_version}")
    changes += _field_changes(last.spec.fields, spec.fields)
    for role in sorted(set(spec.inputs) | set(last.spec.inputs)):
        now, before = spec.inputs.get(role), last.spec.inputs.get(role)
        if now == before or role in waiting:
            continue
        changes.append(_input_change(step, role, last.sources.get(role), added=before is None, removed=now is None))
    return changes


def _field_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"field {name} {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(set(before) | set(now))
        if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]


def _input_change(step: Step, role: str, text_before: str | None, added: bool, removed: bool) -> str:
    """Describe an input that differs from last time, by the name that the user knows."""
    if removed:
        return f"no {role} any more"
    if role in step.needs:
        return f"`{step.needs[role]}` is new here" if added else f"`{step.needs[role]}` came out differently"
    source = step.sources[role]
    if added:
        return f"{role} {source.text} is new"
    if text_before != source.text:
        return f"{role} is now {source.text}, was {text_before}"
    return f"{source.describe()} changed"
