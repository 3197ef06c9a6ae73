"""What a step is, the kinds there are, and what identifies the result of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.pipeline.sources import Source, directory_digest

EVALUATION = "evaluation.json"

# Raised by hand when a step's code starts to give another result for the same settings and inputs.
STEP_VERSIONS = {
    "compile": 4,
    "slice": 1,
    "refine": 2,
    "train": 2,
    "correct": 3,
    "polish": 3,
    "merge": 1,
    "evaluate": 1,
}

# Executes a step: the payload folders of the steps it needs, and the folder to fill.
Execute = Callable[[Mapping[str, Path], Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """One piece of work. `needs` maps what an input is for to the step it comes from; `optional` ones may fail.

    `ratio` tells that of the emulator which a compile makes; it may look at the original's headers. `passes` are
    settings of its passes over the original that decide no result, but how an interrupted one goes on.
    """

    name: str
    kind: str
    execute: Execute
    fields: Mapping[str, Any]
    sources: Mapping[str, Source]
    needs: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    task: str | None = None
    ratio: Callable[[], float] | None = None
    passes: Mapping[str, Any] = field(default_factory=dict)

    def begun_with(self, inputs: Mapping[str, Path]) -> dict[str, Any]:
        """What work on this step is begun with beside all that its key says: where its inputs lie, and its passes."""
        return {
            "sources": {role: source.text for role, source in self.sources.items()},
            "inputs": {role: str(path) for role, path in inputs.items()},
            "passes": dict(self.passes),
        }


def payload_digest(kind: str) -> Callable[[Path], str] | None:
    """What identifies the payload of a step: weights, configuration and tokenizer, not the reports beside them."""
    return {
        "compile": directory_digest,
        "slice": directory_digest,
        "refine": directory_digest,
        "train": adapter_digest,
        "correct": adapter_digest,
        "polish": adapter_digest,
        "merge": directory_digest,
        "evaluate": None,
    }[kind]


# An interrupted step of these kinds goes on where it was.
RESUMABLE = frozenset({"compile", "refine", "train", "polish", "merge"})


def emulator_step(manifest: Manifest, task: str) -> str:
    """The step that makes the emulator a task trains on: the common one, or a slice of it; refined where asked for."""
    ratio, emulator = manifest.tasks[task].ratio, manifest.emulator
    kind = "refine" if emulator is not None and emulator.refinement is not None else None
    return (kind or "compile") if ratio is None else f"{kind or 'slice'} {ratio}"


def fitting_step(manifest: Manifest, task: str) -> str:
    """The step whose adapter fits the original: the correction, or training on the original where nothing else is."""
    return f"{task}.direct" if manifest.emulator is None else f"{task}.correct"


def model_source(manifest: Manifest) -> Source:
    """The original that a manifest names."""
    return Source(manifest.model.path, is_model=True, revision=manifest.model.revision)
