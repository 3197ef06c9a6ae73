"""Manifest and store in, work done out: `plan` says what must run and why without touching a weight, `run` does it."""

import os
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from onelayer.compiler.errors import InputError
from onelayer.compiler.results import Result
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.manifest.manifest import Manifest, check_tasks
from onelayer.runtime.pipeline.costs import Costs, StepCosts
from onelayer.runtime.pipeline.outputs import check_results, publish_run
from onelayer.runtime.pipeline.reasons import RunRecord, reason_to_run
from onelayer.runtime.pipeline.reuse import cut, describe_emulator, larger_emulator
from onelayer.runtime.pipeline.sources import Source, model_directory, source_digest
from onelayer.runtime.pipeline.step import EVALUATION, RESUMABLE, STEP_VERSIONS, Step, model_source, payload_digest
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.store.record import Artifact, Notify, StepSpec, silent
from onelayer.runtime.store.store import ArtifactStore

UNCHANGED = "made before from the same inputs and settings"


class PlannedStep(StepCosts):
    """One step of a plan. Key and path are None where an input is not known before another step has run.

    Bytes and peaks are predictions for running it; a cached step costs nothing.
    """

    name: str
    kind: str
    state: Literal["cached", "to run"]
    reason: str
    key: str | None
    path: str | None


class StepResult(Result):
    """One step of a run; `reason` says why it ran, or what went wrong."""

    name: str
    kind: str
    state: Literal["cached", "ran", "failed", "skipped"]
    reason: str
    key: str | None
    path: str | None


class Plan(Result):
    """What a run would do."""

    steps: list[PlannedStep]


class RunResult(Result):
    """What a run did, per task the scores of the original and its adapters, and where the report lies."""

    steps: list[StepResult]
    evaluations: dict[str, list[dict[str, Any]]]
    report: str | None = None

    @property
    def failed(self) -> list[StepResult]:
        """The steps that went wrong (not those skipped because of them)."""
        return [step for step in self.steps if step.state == "failed"]


def plan(manifest: Manifest, store: ArtifactStore | None = None, tasks: list[str] | None = None) -> Plan:
    """Every step of a manifest with its state and the reason, from digests alone."""
    store = store or ArtifactStore()
    steps = steps_of(manifest, check_tasks(manifest, tasks))
    sources = _source_digests(steps)
    record = RunRecord.of(manifest.path, store)
    known: dict[str, str] = {}  # step name to the digest of its artifact
    planned: list[PlannedStep] = []
    costs = Costs(manifest, model_directory(model_source(manifest)))
    for step in steps:
        spec, waiting = _specify(step, sources, known)
        artifact = store.find(spec.key) if not waiting else None
        damage = store.damage(artifact) if artifact is not None else None
        cached = artifact is not None and damage is None
        if artifact is not None and cached:
            known[step.name] = artifact.digest
        foreseen = StepCosts() if cached else _costs_of(costs, manifest, step)
        reason = UNCHANGED if cached else reason_to_run(step, spec, record, waiting, damage)
        if not waiting and not cached and (larger := larger_emulator(store, spec)) is not None:
            reason += f"; cut from {describe_emulator(larger)} in the store"
            foreseen = foreseen.model_copy(update={"read_bytes": larger.total_bytes, "peak_bytes": None})
        planned.append(
            PlannedStep(
                name=step.name,
                kind=step.kind,
                state="cached" if cached else "to run",
                reason=reason,
                **foreseen.model_dump(),
                key=None if waiting else spec.key,
                path=None if waiting else str(store.payload(spec.key)),
            )
        )
    return Plan(steps=planned)


def run(
    manifest: Manifest,
    store: ArtifactStore | None = None,
    tasks: list[str] | None = None,
    notify: Notify = silent,
) -> RunResult:
    """Bring every step of a manifest up to date; one that fails stops those behind it, and no other.

    What the user's files hold is read before the first step starts, so a mistake there raises `InputError` at once.
    """
    store = store or ArtifactStore()
    steps = steps_of(manifest, check_tasks(manifest, tasks))
    check_results(manifest, steps)
    _download_models(steps, notify)
    costs = Costs(manifest, model_directory(model_source(manifest)))
    sources = _source_digests(steps)
    record = RunRecord.of(manifest.path, store)
    made: dict[str, Artifact] = {}
    results: list[StepResult] = []
    with ExitStack() as in_use:
        for number, step in enumerate(steps, start=1):
            tell = partial(_tell, notify, f"[{number}/{len(steps)}] {step.name}")
            blocked = [need for role, need in step.needs.items() if need not in made and role not in step.optional]
            if blocked:
                results.append(_outcome(step, "skipped", f"needs {', '.join(blocked)}, which did not succeed"))
                tell(results[-1].reason)
                continue
            known = {name: artifact.digest for name, artifact in made.items()}
            spec, _ = _specify(step, sources, known)
            try:
                result, artifact = _ensure_step(step, spec, store, record, made, tell)
            except Exception as error:
                name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
                results.append(_outcome(step, "failed", " ".join(f"{name}{error}".split()), spec.key))
                tell(f"failed, {results[-1].reason}")
                if os.environ.get("ONELAYER_DEBUG"):
                    notify(traceback.format_exc())
                continue
            in_use.enter_context(store.use(artifact.key))
            made[step.name] = artifact
            results.append(result)
            record.remember(step, spec)
        done = RunResult(steps=results, evaluations=_evaluations(steps, made, store))
        foreseen = {step.name: _costs_of(costs, manifest, step).peak_bytes for step in steps}
        report = publish_run(manifest, store, steps, made, done.model_dump(mode="json"), foreseen)
        return done.model_copy(update={"report": str(report)})


def _costs_of(costs: Costs, manifest: Manifest, step: Step) -> StepCosts:
    """What running a step costs, on the common emulator, a slice of it or the original itself."""
    own = None if step.task is None else manifest.tasks[step.task].ratio
    ratio = step.fields.get("ratio") if step.kind in ("slice", "refine") else own
    return costs.of(step.kind, step.task, ratio, direct=step.name.endswith(".direct"))


def _specify(
    step: Step, sources: Mapping[Source, str | None], known: Mapping[str, str]
) -> tuple[StepSpec, dict[str, str]]:
    """What decides a step's result, and what the inputs not known yet wait for (the key means nothing then)."""
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
    version = STEP_VERSIONS[step.kind]
    return StepSpec(kind=step.kind, step_version=version, fields=dict(step.fields), inputs=inputs), waiting


def _ensure_step(
    step: Step,
    spec: StepSpec,
    store: ArtifactStore,
    record: RunRecord,
    made: Mapping[str, Artifact],
    tell: Notify,
) -> tuple[StepResult, Artifact]:
    """Find or make one artifact whose inputs are all there."""
    inputs = {role: store.payload(made[need].key) for role, need in step.needs.items() if need in made}
    found = store.find(spec.key)
    reason = reason_to_run(step, spec, record, {}, store.damage(found) if found is not None else None)

    def make(payload: Path) -> Mapping[str, Any]:
        larger = larger_emulator(store, spec)
        if larger is not None and step.ratio is not None:
            tell(f"cut from {describe_emulator(larger)}, {reason}")
            return cut(store, larger, step.ratio(), payload)
        tell(f"runs, {reason}")
        return step.execute(inputs, payload)

    digest = payload_digest(step.kind)
    artifact, ran = store.ensure(
        spec, make, digest, resumable=step.kind in RESUMABLE, begun_with=step.begun_with(inputs), notify=tell
    )
    path = str(store.payload(artifact.key))
    if ran:
        tell(f"done in {artifact.seconds:.1f} s")
        return _outcome(step, "ran", reason, artifact.key, path), artifact
    tell("cached")
    return _outcome(step, "cached", UNCHANGED, artifact.key, path), artifact


def _tell(notify: Notify, prefix: str, text: str) -> None:
    notify(f"{prefix}: {text}")


def _outcome(
    step: Step,
    state: Literal["cached", "ran", "failed", "skipped"],
    reason: str,
    key: str | None = None,
    path: str | None = None,
) -> StepResult:
    return StepResult(name=step.name, kind=step.kind, state=state, reason=reason, key=key, path=path)


def _source_digests(steps: list[Step]) -> dict[Source, str | None]:
    """What every file of the user's holds now, each read once."""
    sources = dict.fromkeys(source for step in steps for source in step.sources.values())
    return {source: source_digest(source) for source in sources}


def _download_models(steps: list[Step], notify: Notify) -> None:
    """Fetch what a manifest names by Hub id, so that its digest is known."""
    for source in {source for step in steps for source in step.sources.values() if source.is_model}:
        if not Path(source.text).is_absolute():
            notify(f"looking up {source.describe()} on the Hub")
            resolve_model(source.text, source.revision)


def _evaluations(steps: list[Step], made: Mapping[str, Artifact], store: ArtifactStore) -> dict[str, list[Any]]:
    """The score rows of every task that was evaluated."""
    return {
        step.task: read_json(store.payload(made[step.name].key) / EVALUATION)["results"]
        for step in steps
        if step.kind == "evaluate" and step.task is not None and step.name in made
    }
