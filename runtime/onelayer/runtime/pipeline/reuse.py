"""Finds a shortcut for a compile: a slice of a larger emulator in the store."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from onelayer.runtime.store.record import Artifact, StepSpec
from onelayer.runtime.store.store import ArtifactStore


def size_field(fields: Mapping[str, Any]) -> str:
    """Name the field that sets how much of the original an emulator keeps."""
    return "keep_bytes" if "keep_bytes" in fields else "ratio"


def describe_emulator(emulator: Artifact) -> str:
    """Describe an emulator of the store by its size, for use in a reason."""
    name = size_field(emulator.fields)
    return f"the emulator of {name} {emulator.fields[name]}"


def larger_emulator(store: ArtifactStore, spec: StepSpec) -> Artifact | None:
    """Find the smallest intact emulator in the store, of equal inputs and settings, that `spec` can be sliced from."""
    name = size_field(spec.fields)
    size = spec.fields.get(name)
    if not isinstance(size, float) or not _is_a_prefix(spec.fields):
        return None
    found = []
    for artifact in store.artifacts():
        same = (artifact.kind, artifact.step_version, artifact.inputs) == (spec.kind, spec.step_version, spec.inputs)
        larger = artifact.fields.get(name)
        alike = {**artifact.fields, name: size} == spec.fields
        if same and alike and isinstance(larger, float) and larger > size and store.damage(artifact) is None:
            found.append((larger, artifact))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _is_a_prefix(fields: Mapping[str, Any]) -> bool:
    """Return whether factors are prefixes of those of larger emulators.

    Quantized factors are rounded for their rank, and those of a share of bytes may be quantized. Ranks by spectrum are
    chosen again for each size.
    """
    dtype = fields.get("factor_dtype")
    rounded = dtype in ("int8", "nf4") or (dtype is None and "keep_bytes" in fields)
    return not rounded and "rank_allocation" not in fields


def slice_larger(store: ArtifactStore, larger: Artifact, ratio: float, output: Path) -> Mapping[str, Any]:
    """Slice the smaller emulator off the larger one, and protect the larger one from `prune` while reading it."""
    from onelayer.compiler import slice_emulator

    with ExitStack() as stack:
        folder = stack.enter_context(store.use(larger.key))
        return slice_emulator(folder, ratio=ratio, output=output).model_dump(mode="json")
