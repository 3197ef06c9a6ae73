"""The kinds of steps: one record with everything that the pipeline, the store and the report know about each.

A new kind is one entry of `STEP_KINDS` and the step that names it; see `steps.py` and `task_steps.py` for the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.pipeline import costs
from onelayer.runtime.pipeline.costs import CostBasis, Costs, StepCosts
from onelayer.runtime.pipeline.reuse import larger_emulator
from onelayer.runtime.pipeline.step import Step, directory_digest
from onelayer.runtime.reporting import run_figures
from onelayer.runtime.reporting.run_figures import Loader, StepFigures
from onelayer.runtime.store.record import Artifact, StepSpec
from onelayer.runtime.store.store import ArtifactStore
from onelayer.runtime.training.trainer_args import TOOL_FOLDER

EVALUATION = "evaluation.json"


def _scores(payload: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(payload / EVALUATION)["results"]
    return rows


@dataclass(frozen=True)
class StepKind:
    """One kind of step. The `Step` itself holds everything else that enters a key.

    For the store: raise `version` by hand when the code gives a different result for the same settings and inputs.
    `digest` identifies a payload by what decides later steps (weights, configuration, tokenizer; no reports); None
    counts every file. Interrupted work of a `resumable` kind is resumed. `slice_of` finds an artifact that the result
    can be sliced from.

    For the user: `predict` computes the costs for the dry run. `folder` follows the task's name in the manifest's
    `output`; `logs` is a folder of the result that is put there even if the result is not. `loader` is how a result is
    loaded. An `intermediate` result counts only if no later step uses it. `figures` are what the report draws, `scores`
    the rows of its table.
    """

    version: int
    digest: Callable[[Path], str] | None = None
    resumable: bool = False
    slice_of: Callable[[ArtifactStore, StepSpec], Artifact | None] | None = None
    predict: Callable[[CostBasis], StepCosts] = costs.unknown_costs
    folder: str | None = None
    logs: str | None = None
    loader: Loader | None = None
    intermediate: bool = False
    figures: Callable[[str, Path], StepFigures] = run_figures.no_figures
    scores: Callable[[Path], list[dict[str, Any]]] | None = None

    @property
    def is_product(self) -> bool:
        """Whether a result is a final product for the user."""
        return self.loader is not None and not self.intermediate


STEP_KINDS = {
    "encode": StepKind(version=1, resumable=True),
    "compile": StepKind(
        version=4,
        digest=directory_digest,
        resumable=True,
        slice_of=larger_emulator,
        predict=costs.compile_costs,
        figures=run_figures.emulator_figures,
    ),
    "slice": StepKind(version=1, digest=directory_digest, predict=costs.slice_costs),
    "refine": StepKind(
        version=2,
        digest=directory_digest,
        resumable=True,
        predict=costs.refine_costs,
        figures=run_figures.refined_figures,
    ),
    "reference": StepKind(version=1, predict=costs.evaluate_costs),
    "train": StepKind(
        version=2,
        digest=adapter_digest,
        resumable=True,
        predict=costs.train_costs,
        folder="adapter",
        logs=TOOL_FOLDER,
        loader="adapter",
        intermediate=True,
        figures=run_figures.training_figures,
    ),
    "correct": StepKind(
        version=3, digest=adapter_digest, predict=costs.correct_costs, folder="corrected", loader="adapter"
    ),
    "polish": StepKind(
        version=3,
        digest=adapter_digest,
        resumable=True,
        predict=costs.polish_costs,
        folder="polished",
        loader="adapter",
        figures=run_figures.polish_figures,
    ),
    "merge": StepKind(
        version=1, digest=directory_digest, resumable=True, predict=costs.merge_costs, folder="merged", loader="model"
    ),
    "samples": StepKind(version=1, resumable=True, folder="samples"),
    "evaluate": StepKind(version=1, predict=costs.evaluate_costs, folder="scores", scores=_scores),
}


def step_costs(step: Step, costs: Costs) -> StepCosts:
    """Predict what running a step costs."""
    basis = costs.basis(step)
    return StepCosts() if basis is None else STEP_KINDS[step.kind].predict(basis)


def sliceable_artifact(step: Step, spec: StepSpec, store: ArtifactStore) -> Artifact | None:
    """Find an artifact to slice the result of a step from, instead of computing it."""
    find = STEP_KINDS[step.kind].slice_of
    return None if find is None else find(store, spec)


def product_kinds() -> frozenset[str]:
    """Name the kinds whose results are final products for the user."""
    return frozenset(name for name, kind in STEP_KINDS.items() if kind.is_product)
