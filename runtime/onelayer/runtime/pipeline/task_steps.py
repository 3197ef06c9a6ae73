"""Builds the steps of a task: train an adapter, correct it for the original, polish it, merge it, score it.

Nothing here imports torch before a step executes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.compiler.storage.files import write_json
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.manifest.sections import Lora, Polish, Training
from onelayer.runtime.pipeline.kinds import EVALUATION
from onelayer.runtime.pipeline.step import Source, Step, data_sources, given, model_path, model_source
from onelayer.runtime.training.settings import TrainSettings
from onelayer.runtime.training.trainer_args import LEARNING_RATES, NON_SEMANTIC_ARGS


def correct_step(manifest: Manifest, task: str, model: Source) -> Step:
    """Fit the adapter of a task to the original."""
    held_out: dict[str, Any] = {}
    limit, validation = manifest.limit(task), manifest.tasks[task].validation
    if limit == "auto" and validation is not None:
        held_out = {"data": given("validation data", validation, {}), **manifest.stream.model_dump()}

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import correct_adapter

        result = correct_adapter(
            inputs["adapter"],
            emulator=inputs["emulator"],
            model=model_path(model),
            output=output,
            limit=limit,
            **held_out,
        )
        return result.model_dump(mode="json")

    needs = {"emulator": emulator_step(manifest, task), "adapter": f"{task}.train"}
    fields: dict[str, Any] = {"limit": limit}
    sources = {"model": model}
    if limit == "auto":
        fields |= manifest.training(task).lengths()
        held_out |= manifest.training(task).lengths()
        sources |= data_sources("validation data", validation)
    return Step(f"{task}.correct", "correct", execute, fields, sources, needs=needs, task=task)


def polish_step(manifest: Manifest, task: str, model: Source, polishing: Polish) -> Step:
    """Train a few exact steps on the original, starting from the corrected adapter."""
    validation, lengths = manifest.tasks[task].validation, manifest.training(task).lengths()
    data, settings = manifest.tasks[task].train, polishing.model_dump(mode="json")

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import polish_adapter

        result = polish_adapter(
            inputs["adapter"],
            model=model_path(model),
            data=given("train data", data, inputs),
            output=output,
            **lengths,
            eval_data=None if validation is None else given("validation data", validation, inputs),
            device=manifest.stream.device,
            seed=manifest.seed,
            **settings,
        )
        return result.model_dump(mode="json")

    sources = {"model": model, **data_sources("train data", data), **data_sources("validation data", validation)}
    fields = {**settings, **lengths, "seed": manifest.seed}
    needs = {"adapter": fitting_step(manifest, task)}
    passes = {"device": manifest.stream.device}
    return Step(f"{task}.polish", "polish", execute, fields, sources, needs=needs, task=task, passes=passes)


def merge_step(task: str, model: Source, adapter: str) -> Step:
    """Merge the adapter of a step into the original."""

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import merge_adapter

        base = model_path(model)
        return merge_adapter(inputs["adapter"], model=base, output=output).model_dump(mode="json")

    return Step(f"{task}.merge", "merge", execute, {}, {"model": model}, needs={"adapter": adapter}, task=task)


def evaluate_step(manifest: Manifest, task: str, model: Source) -> Step:
    """Score the original and every adapter of a task in one stream, without a direct adapter whose training failed."""
    test = manifest.tasks[task].test
    assert test is not None
    lengths = manifest.training(task).lengths()

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import evaluate_model

        adapters = {name: path for name, path in inputs.items() if name in needs}
        result = evaluate_model(
            model_path(model),
            given("test data", test, inputs),
            adapters=list(adapters.values()),
            **lengths,
            batch_size=manifest.stream.batch_size,
            device=manifest.stream.device,
        )
        document: dict[str, Any] = result.model_dump(mode="json")
        names: dict[str | None, str] = {None: "original", **{str(path): name for name, path in adapters.items()}}
        rows = [{"name": names[row["adapter"]], **row} for row in document["results"]]
        output.mkdir(exist_ok=True)
        write_json(output / EVALUATION, {**document, "results": rows})
        return document

    needs = {} if manifest.emulator is None else {"uncorrected": f"{task}.train", "corrected": f"{task}.correct"}
    if manifest.polishing(task) is not None:
        needs["polished"] = f"{task}.polish"
    if manifest.direct or manifest.emulator is None:
        needs["direct"] = f"{task}.direct"
    return Step(
        f"{task}.evaluate",
        "evaluate",
        execute,
        lengths,
        {"model": model, **data_sources("test data", test)},
        needs=needs,
        optional=frozenset({"direct"}),
        task=task,
    )


def steps_of_task(manifest: Manifest, task: str) -> list[Step]:
    """List the steps of one task: training and correction, or training on the original; then the optional steps."""
    model = model_source(manifest)
    steps = []
    if manifest.emulator is not None:
        steps += [reference_step(manifest, task, model)] if manifest.train.method != "sft" else []
        steps += [_train_step(manifest, task, direct=False), correct_step(manifest, task, model)]
    direct = [_train_step(manifest, task, direct=True)] if manifest.direct or manifest.emulator is None else []
    if manifest.emulator is None:
        steps += direct
    if (polishing := manifest.polishing(task)) is not None:
        steps.append(polish_step(manifest, task, model, polishing))
    if manifest.emulator is not None:
        steps += direct
    if manifest.tasks[task].merge:
        steps.append(merge_step(task, model, final_step(manifest, task)))
    if manifest.tasks[task].test is not None:
        steps.append(evaluate_step(manifest, task, model))
    return steps


def reference_step(manifest: Manifest, task: str, model: Source) -> Step:
    """Score the answers of a task's preferences under the original, held-out ones too, for every training on them."""
    training, method = manifest.training(task), manifest.train.method
    assert method != "sft"
    data, held_out = manifest.tasks[task].train, manifest.tasks[task].validation
    fields: dict[str, Any] = {"method": method, "max_length": training.max_length}
    batch_size = training.args.get("per_device_train_batch_size", TrainSettings.default("batch_size"))
    if method == "kto":  # the answers of one batch are compared
        fields["train_batch_size"] = batch_size

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import reference_scores

        result = reference_scores(
            model_path(model),
            given("train data", data, inputs),
            output,
            method=method,
            train_batch_size=batch_size,
            eval_data=None if held_out is None else given("validation data", held_out, inputs),
            max_length=training.max_length,
            **manifest.stream.model_dump(),
        )
        return result.model_dump(mode="json")

    sources = {"model": model, **data_sources("train data", data), **data_sources("validation data", held_out)}
    return Step(f"{task}.reference", "reference", execute, fields, sources, task=task)


def _train_step(manifest: Manifest, task: str, direct: bool) -> Step:
    """Train on the emulator, or with `direct` on the original itself (the upper bound), streamed if it does not fit."""
    training = manifest.training(task)
    model, data = model_source(manifest), manifest.tasks[task].train
    sources = data_sources("train data", data)
    anchored = training.anchor is not None and not direct
    scored = manifest.tasks[task].validation if training.args.get("eval_steps") is not None else None
    referred = training.method != "sft" and not direct

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.runtime import train_lora

        original = model_path(model) if direct or anchored else None
        base = original if direct else inputs["emulator"]
        assert base is not None
        anchors = {**anchor_arguments(training), "model": original} if anchored else {}
        held_out = {} if scored is None else {"eval_data": given("validation data", scored, inputs)}
        reference = {"reference": inputs["reference"]} if referred else {}
        held = {"way": training.way} if direct else {}
        settings = {
            **train_arguments(training),
            **anchors,
            **held_out,
            **reference,
            **held,
            "seed": manifest.seed,
            "resume": True,
        }
        result = train_lora(base, given("train data", data, inputs), output, **settings)
        return result.model_dump(mode="json")

    lora = training.lora.model_dump(mode="json", include={"r", "alpha", "target_modules"})
    semantic = {name: value for name, value in training.args.items() if name not in NON_SEMANTIC_ARGS}
    if training.method == "sft":  # its default has changed once, and a result of the old one must not be found
        semantic = {"learning_rate": LEARNING_RATES["sft"], **semantic}
    further = _further_lora_fields(training.lora)
    # Omitted if nothing is compressed, so that results from before the field existed are found.
    compressed = training.activations.where != "none"
    activations = {"activations": training.activations.model_dump(mode="json")} if compressed else {}
    method = {} if training.method == "sft" else {"method": training.method}
    fields = {
        **lora,
        **further,
        **semantic,
        **activations,
        **method,
        **training.lengths(),
        "seed": manifest.seed,
    }
    if direct:
        return Step(f"{task}.direct", "train", execute, fields, {"model": model, **sources}, task=task)
    if anchored:  # left out otherwise, like activations
        fields["anchor"] = anchor_arguments(training)
        sources["model"] = model
    needs = {"emulator": emulator_step(manifest, task)}
    if referred:
        needs["reference"] = f"{task}.reference"
    return Step(f"{task}.train", "train", execute, fields, sources, needs=needs, task=task)


def emulator_step(manifest: Manifest, task: str) -> str:
    """Name the step that makes a task's emulator: the common one or a slice of it, refined if requested."""
    ratio, emulator = manifest.tasks[task].ratio, manifest.emulator
    refined = emulator is not None and emulator.refine is not None
    if ratio is None:
        return "refine" if refined else "compile"
    return f"refine {ratio}" if refined else f"slice {ratio}"


def fitting_step(manifest: Manifest, task: str) -> str:
    """Name the step whose adapter fits the original: the correction, or without an emulator the direct training."""
    return f"{task}.direct" if manifest.emulator is None else f"{task}.correct"


def final_step(manifest: Manifest, task: str) -> str:
    """Name the step that makes a task's final adapter for the original."""
    return fitting_step(manifest, task) if manifest.polishing(task) is None else f"{task}.polish"


def train_arguments(training: Training) -> dict[str, Any]:
    """Turn a training section into keyword arguments of `train_lora`."""
    modules = training.lora.target_modules
    return {
        "lora_rank": training.lora.r,
        "lora_alpha": training.lora.alpha,
        "target_modules": modules if isinstance(modules, str) else list(modules),
        **training.lengths(),
        "activations": training.activations.where,
        "activation_rank": training.activations.rank,
        "lora": _further_lora_fields(training.lora),
        "args": dict(training.args),
        **({} if training.method == "sft" else {"method": training.method}),
    }


def anchor_arguments(training: Training) -> dict[str, Any]:
    """Turn the anchors of a training section into keyword arguments of `train_lora`."""
    return {} if training.anchor is None else {f"anchor_{name}": value for name, value in training.anchor}


def _further_lora_fields(lora: Lora) -> dict[str, Any]:
    """Return the LoRA fields that a manifest sets beyond the common three.

    Defaults are left out, so a new field keeps old keys.
    """
    return lora.model_dump(mode="json", exclude_defaults=True, exclude={"r", "alpha", "target_modules"})
