"""Plans a manifest: which steps must run and why, without reading a weight."""

from collections.abc import Mapping
from typing import Literal

from onelayer.compiler.results import Result
from onelayer.runtime.manifest.manifest import Manifest, check_tasks
from onelayer.runtime.pipeline.costs import Costs, StepCosts
from onelayer.runtime.pipeline.emulator_size import decided
from onelayer.runtime.pipeline.kinds import STEP_KINDS, sliceable_artifact, step_costs
from onelayer.runtime.pipeline.reasons import UNCHANGED, RunRecord, reason_to_run
from onelayer.runtime.pipeline.reuse import describe_emulator
from onelayer.runtime.pipeline.step import Source, Step, model_directory, model_source, source_digests
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore


class PlannedStep(StepCosts):
    """One step of a plan. Key and path are None if an input stays unknown until another step has run.

    Bytes and peaks are predictions for running the step; a cached step costs nothing.
    """

    name: str
    kind: str
    state: Literal["cached", "to run"]
    reason: str
    key: str | None
    path: str | None


class Plan(Result):
    """The steps that a run would check or execute. `note` says what `train.on: auto` decided, or that it is open."""

    steps: list[PlannedStep]
    note: str | None = None


def plan(manifest: Manifest, store: ArtifactStore | None = None, tasks: list[str] | None = None) -> Plan:
    """List every step of a manifest with its state and the reason, from digests alone."""
    store = store or ArtifactStore()
    manifest, note = decided(manifest, store, measure=False)
    planner = _Planner(manifest, store, steps_of(manifest, check_tasks(manifest, tasks)))
    return Plan(steps=[planner.foresee(step) for step in planner.steps], note=note)


def specify(
    step: Step, sources: Mapping[Source, str | None], known: Mapping[str, str]
) -> tuple[StepSpec, dict[str, str]]:
    """Return what decides a step's result, and what its unknown inputs wait for.

    With unknown inputs the key is meaningless.

    `known` maps steps to the digests of their artifacts.
    """
    inputs: dict[str, str] = {}
    waiting: dict[str, str] = {}
    for role, source in step.sources.items():
        digest = sources[source]
        if digest is None:
            waiting[role] = f"{source.describe()} is downloaded"
        else:
            inputs[role] = digest
    for role, need in step.needs.items():
        if need in known:
            inputs[role] = known[need]
        else:
            waiting[role] = need
    version = STEP_KINDS[step.kind].version
    return StepSpec(kind=step.kind, step_version=version, fields=dict(step.fields), inputs=inputs), waiting


class _Planner:
    """The steps of one manifest, planned in order: a cached step makes the keys after it known."""

    def __init__(self, manifest: Manifest, store: ArtifactStore, steps: list[Step]) -> None:
        self.steps = steps
        self._store = store
        self._sources = source_digests(steps)
        self._record = RunRecord.of(manifest.path, store)
        self._costs = Costs(manifest, model_directory(model_source(manifest)))
        self._known: dict[str, str] = {}  # step name to the digest of its artifact

    def foresee(self, step: Step) -> PlannedStep:
        """Plan what a run would do with a step."""
        spec, waiting = specify(step, self._sources, self._known)
        artifact = self._store.find(spec.key) if not waiting else None
        damage = self._store.damage(artifact) if artifact is not None else None
        if artifact is not None and damage is None:
            self._known[step.name] = artifact.digest
            return self._planned(step, "cached", UNCHANGED, spec, StepCosts())
        costs = step_costs(step, self._costs)
        reason = reason_to_run(step, spec, self._record, waiting, damage)
        if waiting:
            return self._planned(step, "to run", reason, None, costs)
        if (larger := sliceable_artifact(step, spec, self._store)) is not None:
            reason += f"; sliced from {describe_emulator(larger)} in the store"
            costs = costs.model_copy(update={"read_bytes": larger.total_bytes, "peak_bytes": None})
        return self._planned(step, "to run", reason, spec, costs)

    def _planned(
        self, step: Step, state: Literal["cached", "to run"], reason: str, spec: StepSpec | None, costs: StepCosts
    ) -> PlannedStep:
        return PlannedStep(
            name=step.name,
            kind=step.kind,
            state=state,
            reason=reason,
            **costs.model_dump(),
            key=None if spec is None else spec.key,
            path=None if spec is None else str(self._store.payload(spec.key)),
        )
