"""Runs a manifest: executes every step that is not up to date, and publishes the results."""

import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from onelayer.compiler.errors import InputError
from onelayer.compiler.results import Result
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.runtime.manifest.manifest import Manifest, check_tasks
from onelayer.runtime.pipeline.costs import Costs
from onelayer.runtime.pipeline.emulator_size import decided
from onelayer.runtime.pipeline.kinds import STEP_KINDS, sliceable_artifact, step_costs
from onelayer.runtime.pipeline.outputs import FinishedRun, check_results, publish_run
from onelayer.runtime.pipeline.plan import specify
from onelayer.runtime.pipeline.reasons import UNCHANGED, RunRecord, reason_to_run
from onelayer.runtime.pipeline.reuse import describe_emulator, slice_larger
from onelayer.runtime.pipeline.step import Source, Step, model_directory, model_source, source_digests, unchanged
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.store.locks import BusyError
from onelayer.runtime.store.record import Artifact, Notify, StepSpec, silent
from onelayer.runtime.store.store import ArtifactStore


class StepResult(Result):
    """One step of a run; `reason` is why it ran, or what went wrong.

    `promised_bytes` is the device peak that a streamed pass promised or the planner predicted, `peak_device_bytes` the
    measured one; None where there is none.
    """

    name: str
    kind: str
    state: Literal["cached", "ran", "failed", "skipped"]
    reason: str
    key: str | None
    path: str | None
    promised_bytes: int | None = None
    peak_device_bytes: int | None = None


class RunResult(Result):
    """The steps of a run, the scores of the original and its adapters by task, and the path of the report."""

    steps: list[StepResult]
    evaluations: dict[str, list[dict[str, Any]]]
    report: str | None = None

    @property
    def failed(self) -> list[StepResult]:
        """The steps that failed, without those skipped because of them."""
        return [step for step in self.steps if step.state == "failed"]


def run(
    manifest: Manifest,
    store: ArtifactStore | None = None,
    tasks: list[str] | None = None,
    notify: Notify = silent,
) -> RunResult:
    """Bring every step of a manifest up to date. A failed step stops only those that need it.

    The user's files are read before the first step starts, so a mistake in them raises `InputError` immediately.
    """
    store = store or ArtifactStore()
    manifest, note = decided(manifest, store, measure=True)
    if note is not None:
        notify(note)
    steps = steps_of(manifest, check_tasks(manifest, tasks))
    check_results(manifest, steps)
    _download_models(steps, notify)
    steps = steps_of(manifest, check_tasks(manifest, tasks))  # what kind of model it is counts in the keys
    costs = Costs(manifest, model_directory(model_source(manifest)))
    with ExitStack() as in_use:
        runner = _Runner(store, RunRecord.of(manifest.path, store), source_digests(steps), in_use, notify)
        results = runner.bring_up_all(steps)
        foreseen = {step.name: step_costs(step, costs).peak_bytes for step in steps}
        results = [_with_memory(result, runner.made.get(result.name), foreseen[result.name]) for result in results]
        done = RunResult(steps=results, evaluations=_evaluations(steps, runner.made, store))
        order = [step.name for step in steps_of(manifest, check_tasks(manifest, None))]
        finished = FinishedRun(manifest, store, steps, runner.made, foreseen, order)
        report = publish_run(finished, done.model_dump(mode="json"))
        return done.model_copy(update={"report": str(report)})


@dataclass
class _Runner:
    """One run. `made` maps steps to their existing artifacts; `in_use` keeps these from being pruned."""

    store: ArtifactStore
    record: RunRecord
    sources: Mapping[Source, str | None]
    in_use: ExitStack
    notify: Notify
    made: dict[str, Artifact] = field(default_factory=dict)

    def bring_up_all(self, steps: Sequence[Step]) -> list[StepResult]:
        """Bring up steps in their order. A step that another run is making is put off while there is other work."""
        titles = {step.name: f"[{number}/{len(steps)}] {step.name}" for number, step in enumerate(steps, start=1)}
        remaining, results = list(steps), dict[str, StepResult]()
        while remaining:
            names = {step.name for step in remaining}
            ready = [step for step in remaining if names.isdisjoint(step.needs.values())]
            for step, wait in [*((step, False) for step in ready), (ready[0], True)]:
                try:
                    results[step.name] = self.bring_up(step, titles[step.name], wait=wait)
                except BusyError:
                    continue
                remaining.remove(step)
                break
        return [results[step.name] for step in steps]

    def bring_up(self, step: Step, title: str, *, wait: bool) -> StepResult:
        """Find or make the artifact of one step; a failure is also returned as a result.

        Without `wait`, raises `BusyError` if another run is making it.
        """
        tell = partial(_tell, self.notify, title)
        blocked = [need for role, need in step.needs.items() if need not in self.made and role not in step.optional]
        if blocked:
            result = _outcome(step, "skipped", f"needs {', '.join(blocked)}, which did not succeed")
            tell(result.reason)
            return result
        known = {name: artifact.digest for name, artifact in self.made.items()}
        spec, _ = specify(step, self.sources, known)
        try:
            result, artifact = self._ensure_step(step, spec, tell, wait=wait)
        except BusyError:
            raise
        except Exception as error:
            name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            result = _outcome(step, "failed", " ".join(f"{name}{error}".split()), spec.key)
            tell(f"failed, {result.reason}")
            if os.environ.get("ONELAYER_DEBUG"):
                self.notify(traceback.format_exc())
            return result
        self.in_use.enter_context(self.store.use(artifact.key))
        self.made[step.name] = artifact
        self.record.remember(step, spec)
        return result

    def _ensure_step(self, step: Step, spec: StepSpec, tell: Notify, *, wait: bool) -> tuple[StepResult, Artifact]:
        """Find or make one artifact whose inputs all exist."""
        store, kind = self.store, STEP_KINDS[step.kind]
        inputs = {role: store.payload(self.made[need].key) for role, need in step.needs.items() if need in self.made}
        found = store.find(spec.key)
        reason = reason_to_run(step, spec, self.record, {}, store.damage(found) if found is not None else None)

        def make(payload: Path) -> Mapping[str, Any]:
            larger = sliceable_artifact(step, spec, store)
            if larger is not None and step.ratio is not None:
                tell(f"sliced from {describe_emulator(larger)}, {reason}")
                return slice_larger(store, larger, step.ratio(), payload)
            tell(f"runs, {reason}")
            with unchanged(step, spec.inputs, inputs):
                return step.execute(inputs, payload)

        begun_with = step.begun_with(inputs)
        artifact, ran = store.ensure(
            spec, make, kind.digest, resumable=kind.resumable, begun_with=begun_with, notify=tell, wait=wait
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


def _with_memory(result: StepResult, artifact: Artifact | None, foreseen_bytes: int | None) -> StepResult:
    if artifact is None or artifact.peak_device_bytes is None:
        return result
    memory = {
        "promised_bytes": artifact.promised_bytes or foreseen_bytes,
        "peak_device_bytes": artifact.peak_device_bytes,
    }
    return result.model_copy(update=memory)


def _download_models(steps: list[Step], notify: Notify) -> None:
    """Download what a manifest names by Hub id, so that its digest is known."""
    for source in {source for step in steps for source in step.sources.values() if source.is_model}:
        if not Path(source.text).is_absolute():
            notify(f"looking up {source.describe()} on the Hub")
            resolve_model(source.text, source.revision)


def _evaluations(steps: list[Step], made: Mapping[str, Artifact], store: ArtifactStore) -> dict[str, list[Any]]:
    """Read the score rows of every evaluated task."""
    return {
        step.task: scores(store.payload(made[step.name].key))
        for step in steps
        if step.task is not None and step.name in made and (scores := STEP_KINDS[step.kind].scores) is not None
    }
