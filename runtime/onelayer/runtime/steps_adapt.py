"""What a task does with a trained adapter, as steps: correct it for the original, polish it, merge it, score it.

Nothing here imports torch before a step executes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.compiler.files import write_json
from onelayer.runtime.manifest import Manifest
from onelayer.runtime.manifest_sections import Polish
from onelayer.runtime.sources import Source
from onelayer.runtime.step_kinds import EVALUATION, Step, emulator_step, fitting_step


def correct_step(manifest: Manifest, task: str, model: Source) -> Step:
    """Fit the adapter of a task to the original."""
    held_out: dict[str, Any] = {}
    limit = manifest.limit(task)
    if limit == "auto":
        held_out = {"data": manifest.tasks[task].validation, **manifest.stream.model_dump()}

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import correct_adapter
        from onelayer.compiler.checkpoint import resolve_model

        result = correct_adapter(
            inputs["adapter"],
            emulator=inputs["emulator"],
            model=resolve_model(model.text, model.revision),
            output=output,
            limit=limit,
            **held_out,
        )
        return result.model_dump(mode="json")

    needs = {"emulator": emulator_step(manifest, task), "adapter": f"{task}.train"}
    fields: dict[str, Any] = {"limit": limit}
    sources = {"model": model}
    if limit == "auto":
        fields["max_length"] = held_out["max_length"] = manifest.training(task).max_length
        sources["validation data"] = Source(held_out["data"])
    return Step(f"{task}.correct", "correct", execute, fields, sources, needs=needs, task=task)


def polish_step(manifest: Manifest, task: str, model: Source, polishing: Polish) -> Step:
    """A few exact steps on the original, from the corrected adapter on."""
    validation, max_length = manifest.tasks[task].validation, manifest.training(task).max_length
    data, settings = Source(manifest.tasks[task].train), polishing.model_dump(mode="json")

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import polish_adapter
        from onelayer.compiler.checkpoint import resolve_model

        result = polish_adapter(
            inputs["adapter"],
            model=resolve_model(model.text, model.revision),
            data=data.text,
            output=output,
            max_length=max_length,
            eval_data=validation,
            device=manifest.stream.device,
            seed=manifest.seed,
            **settings,
        )
        return result.model_dump(mode="json")

    sources = {"model": model, "train data": data}
    if validation is not None:
        sources["validation data"] = Source(validation)
    fields = {**settings, "max_length": max_length, "seed": manifest.seed}
    needs = {"adapter": fitting_step(manifest, task)}
    passes = {"device": manifest.stream.device}
    return Step(f"{task}.polish", "polish", execute, fields, sources, needs=needs, task=task, passes=passes)


def merge_step(task: str, model: Source, adapter: str) -> Step:
    """Write the original with the adapter of a step in it."""

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import merge_adapter
        from onelayer.compiler.checkpoint import resolve_model

        base = resolve_model(model.text, model.revision)
        return merge_adapter(inputs["adapter"], model=base, output=output).model_dump(mode="json")

    return Step(f"{task}.merge", "merge", execute, {}, {"model": model}, needs={"adapter": adapter}, task=task)


def evaluate_step(manifest: Manifest, task: str, model: Source) -> Step:
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

    needs = {} if manifest.emulator is None else {"uncorrected": f"{task}.train", "corrected": f"{task}.correct"}
    if manifest.polishing(task) is not None:
        needs["polished"] = f"{task}.polish"
    if manifest.direct or manifest.emulator is None:
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
