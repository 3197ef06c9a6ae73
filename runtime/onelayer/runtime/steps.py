"""A manifest in, its steps out: what each step runs, which settings can change its result, and which inputs it reads.

Nothing here imports torch before a step executes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onelayer.compiler.adapter import adapter_digest
from onelayer.compiler.files import write_json
from onelayer.runtime.manifest import Lora, Manifest, Training
from onelayer.runtime.sources import Source, directory_digest
from onelayer.runtime.trainer_args import NON_SEMANTIC_ARGS

EVALUATION = "evaluation.json"

# Raised by hand when a step's code starts to give another result for the same settings and inputs.
STEP_VERSIONS = {"compile": 1, "train": 1, "correct": 1, "merge": 1, "evaluate": 1}

# Executes a step: the payload folders of the steps it needs, and the folder to fill.
Execute = Callable[[Mapping[str, Path], Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """One piece of work. `needs` maps what an input is for to the step it comes from; `optional` ones may fail."""

    name: str
    kind: str
    execute: Execute
    fields: Mapping[str, Any]
    sources: Mapping[str, Source]
    needs: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    task: str | None = None


def steps_of(manifest: Manifest, tasks: list[str]) -> list[Step]:
    """The steps for the given tasks, each behind those it needs; the emulator is one step for all of them."""
    steps = [_compile_step(manifest)]
    for task in tasks:
        steps += _task_steps(manifest, task)
    return steps


def payload_digest(kind: str) -> Callable[[Path], str] | None:
    """What identifies the payload of a step: weights, configuration and tokenizer, not the reports beside them."""
    return {
        "compile": directory_digest,
        "train": adapter_digest,
        "correct": adapter_digest,
        "merge": directory_digest,
        "evaluate": None,
    }[kind]


def _model_source(manifest: Manifest) -> Source:
    return Source(manifest.model.path, is_model=True, revision=manifest.model.revision)


def _compile_step(manifest: Manifest) -> Step:
    calibration = manifest.emulator.calibration
    model = _model_source(manifest)
    is_local = Path(model.text).is_absolute()

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import compile_emulator

        result = compile_emulator(
            model.text,
            list(calibration.data),
            output,
            ratio=manifest.emulator.ratio,
            samples=calibration.samples,
            max_length=calibration.max_length,
            batch_size=manifest.stream.batch_size,
            device=manifest.stream.device,
            seed=manifest.seed,
            revision=model.revision,
        )
        return result.model_dump(mode="json")

    fields = {
        "ratio": manifest.emulator.ratio,
        "samples": calibration.samples,
        "max_length": calibration.max_length,
        "seed": manifest.seed,
        # A Hub id is written into emulator and adapter, so it is part of the result; a local folder may move.
        "model": None if is_local else model.text,
        "revision": None if is_local else model.revision,
    }
    sources = {f"calibration {index}": Source(data) for index, data in enumerate(calibration.data, start=1)}
    return Step("compile", "compile", execute, fields, {"model": model, **sources})


def _task_steps(manifest: Manifest, task: str) -> list[Step]:
    """What one task runs: training, correction, and where asked for direct training, merging and scoring."""
    model = _model_source(manifest)
    steps = [_train_step(manifest, task, direct=False), _correct_step(manifest, task, model)]
    if manifest.direct:
        steps.append(_train_step(manifest, task, direct=True))
    if manifest.tasks[task].merge:
        steps.append(_merge_step(task, model))
    if manifest.tasks[task].test is not None:
        steps.append(_evaluate_step(manifest, task, model))
    return steps


def _train_step(manifest: Manifest, task: str, direct: bool) -> Step:
    """LoRA on the emulator, or with `direct` on the original itself (the upper bound; it must fit in memory)."""
    training = manifest.training(task)
    model, data = _model_source(manifest), Source(manifest.tasks[task].train)

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler.checkpoint import resolve_model
        from onelayer.runtime import train_lora

        base = resolve_model(model.text, model.revision) if direct else inputs["emulator"]
        result = train_lora(base, data.text, output, **train_arguments(training), seed=manifest.seed, resume=True)
        return result.model_dump(mode="json")

    lora = training.lora.model_dump(mode="json", include={"r", "alpha", "target_modules"})
    semantic = {name: value for name, value in training.args.items() if name not in NON_SEMANTIC_ARGS}
    further = _further_lora_fields(training.lora)
    # Left out where nothing is compressed, so that results from before there was a choice are found.
    compressed = training.activations.where != "none"
    activations = {"activations": training.activations.model_dump(mode="json")} if compressed else {}
    fields = {**lora, **further, **semantic, **activations, "max_length": training.max_length, "seed": manifest.seed}
    if direct:
        return Step(f"{task}.direct", "train", execute, fields, {"model": model, "train data": data}, task=task)
    return Step(
        f"{task}.train", "train", execute, fields, {"train data": data}, needs={"emulator": "compile"}, task=task
    )


def train_arguments(training: Training) -> dict[str, Any]:
    """A training section as keyword arguments of `train_lora`."""
    modules = training.lora.target_modules
    return {
        "lora_rank": training.lora.r,
        "lora_alpha": training.lora.alpha,
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "max_length": training.max_length,
        "activations": training.activations.where,
        "activation_rank": training.activations.rank,
        "lora": _further_lora_fields(training.lora),
        "args": dict(training.args),
    }


def _further_lora_fields(lora: Lora) -> dict[str, Any]:
    """What a manifest sets of LoRA beyond the common three; defaults are left out, so a new field keeps old keys."""
    return lora.model_dump(mode="json", exclude_defaults=True, exclude={"r", "alpha", "target_modules"})


def _correct_step(manifest: Manifest, task: str, model: Source) -> Step:
    held_out: dict[str, Any] = {}
    if manifest.correct.limit == "auto":
        held_out = {"data": manifest.tasks[task].validation, **manifest.stream.model_dump()}

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import correct_adapter
        from onelayer.compiler.checkpoint import resolve_model

        result = correct_adapter(
            inputs["adapter"],
            emulator=inputs["emulator"],
            model=resolve_model(model.text, model.revision),
            output=output,
            limit=manifest.correct.limit,
            **held_out,
        )
        return result.model_dump(mode="json")

    needs = {"emulator": "compile", "adapter": f"{task}.train"}
    fields: dict[str, Any] = {"limit": manifest.correct.limit}
    sources = {"model": model}
    if manifest.correct.limit == "auto":
        fields["max_length"] = held_out["max_length"] = manifest.training(task).max_length
        sources["validation data"] = Source(held_out["data"])
    return Step(f"{task}.correct", "correct", execute, fields, sources, needs=needs, task=task)


def _merge_step(task: str, model: Source) -> Step:
    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import merge_adapter
        from onelayer.compiler.checkpoint import resolve_model

        base = resolve_model(model.text, model.revision)
        return merge_adapter(inputs["adapter"], model=base, output=output).model_dump(mode="json")

    return Step(
        f"{task}.merge", "merge", execute, {}, {"model": model}, needs={"adapter": f"{task}.correct"}, task=task
    )


def _evaluate_step(manifest: Manifest, task: str, model: Source) -> Step:
    """Score the original and every adapter of a task in one stream; without the direct one where that failed."""
    test = manifest.tasks[task].test
    assert test is not None
    max_length = manifest.training(task).max_length

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import evaluate_model
        from onelayer.compiler.checkpoint import resolve_model

        result = evaluate_model(
            resolve_model(model.text, model.revision),
            test,
            adapters=list(inputs.values()),
            max_length=max_length,
            batch_size=manifest.stream.batch_size,
            device=manifest.stream.device,
        )
        document: dict[str, Any] = result.model_dump(mode="json")
        names: dict[str | None, str] = {None: "original", **{str(path): name for name, path in inputs.items()}}
        rows = [{"name": names[row["adapter"]], **row} for row in document["results"]]
        output.mkdir(exist_ok=True)
        write_json(output / EVALUATION, {**document, "results": rows})
        return document

    needs = {"uncorrected": f"{task}.train", "corrected": f"{task}.correct"}
    if manifest.direct:
        needs["direct"] = f"{task}.direct"
    return Step(
        f"{task}.evaluate",
        "evaluate",
        execute,
        {"max_length": max_length},
        {"model": model, "test data": Source(test)},
        needs=needs,
        optional=frozenset({"direct"}),
        task=task,
    )
