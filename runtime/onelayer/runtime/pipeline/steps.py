"""Builds the steps of a manifest: what each runs, which settings can change its result, and which inputs it reads.

Nothing here imports torch before a step executes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.manifest.sections import Emulator, Images, Refine, Samples
from onelayer.runtime.pipeline.emulator_size import PLANNER_VERSION, emulator_size, runs_in_key
from onelayer.runtime.pipeline.step import (
    Source,
    Step,
    all_given,
    holds_projectors,
    model_path,
    model_source,
    pipeline_parts,
)
from onelayer.runtime.pipeline.task_steps import final_step, steps_of_task
from onelayer.runtime.planning.choice import Size

# What a refinement leaves to the form of the emulator.
BY_FORM = ("inputs", "learning_rate")


def steps_of(manifest: Manifest, tasks: list[str]) -> list[Step]:
    """List the steps for the given tasks, each after those it needs. All tasks share one step for the emulator."""
    emulator = manifest.emulator
    steps = [] if emulator is None else [_compile_step(manifest, emulator)]
    ratios = dict.fromkeys(manifest.tasks[task].ratio for task in tasks)
    steps += [_slice_step(ratio) for ratio in ratios if ratio is not None]
    if emulator is not None and (refinement := emulator.refine) is not None:
        steps += [refine_step(manifest, emulator, refinement, ratio) for ratio in ratios]
    for task in tasks:
        steps += steps_of_task(manifest, task)
    if manifest.images is None:
        return steps
    drawing = [] if manifest.samples is None else [_sample_step(manifest, manifest.samples, task) for task in tasks]
    return [*_reading_encoded(manifest, manifest.images, steps), *drawing]


def _reading_encoded(manifest: Manifest, images: Images, steps: list[Step]) -> list[Step]:
    """Let every step read encoded images instead of folders; each folder is encoded once, before all else."""
    folders = [source for step in steps for source in step.sources.values() if not source.is_model]
    names = {source: f"encode {number}" for number, source in enumerate(dict.fromkeys(folders), start=1)}
    encoding = [_encode_step(manifest, images, source, name) for source, name in names.items()]
    reading = []
    for step in steps:
        needs = {role: names[source] for role, source in step.sources.items() if not source.is_model}
        models = {role: source for role, source in step.sources.items() if source.is_model}
        reading.append(replace(step, sources=models, needs={**step.needs, **needs}))
    return [*encoding, *reading]


def _encode_step(manifest: Manifest, images: Images, folder: Source, name: str) -> Step:
    """Encode a folder of images, with those of the class, by the text encoders and the autoencoder of the pipeline."""
    model = model_source(manifest)
    settings = images.model_dump(mode="json", exclude={"class_data"})

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import encode_images

        result = encode_images(
            model.text,
            folder.text,
            output,
            class_data=None if images.class_data is None else Source.of(images.class_data).text,
            device=manifest.stream.device,
            seed=manifest.seed,
            **settings,
        )
        return result.model_dump(mode="json")

    parts = pipeline_parts(Path(model.text))
    sources = {"model": model, "images": replace(folder, is_plain=True), **parts}
    if images.class_data is not None:
        sources["class images"] = replace(Source.of(images.class_data), is_plain=True)
    passes = {"device": manifest.stream.device}
    return Step(name, "encode", execute, {**settings, "seed": manifest.seed}, sources, passes=passes)


def _sample_step(manifest: Manifest, samples: Samples, task: str) -> Step:
    """Draw pictures with the final adapter of a task."""
    model, settings = model_source(manifest), samples.model_dump(mode="json", exclude={"prompts"})

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import sample_pictures

        how = {**settings, "seed": manifest.seed, "device": manifest.stream.device}
        drawn = sample_pictures(model.text, samples.prompts, output, adapter=inputs["adapter"], **how)
        return drawn.model_dump(mode="json")

    fields = {**settings, "prompts": samples.prompts, "seed": manifest.seed}
    sources = {"model": model, **pipeline_parts(Path(model.text))}
    needs = {"adapter": final_step(manifest, task)}
    passes = {"device": manifest.stream.device}
    return Step(f"{task}.samples", "samples", execute, fields, sources, needs=needs, task=task, passes=passes)


def _compile_step(manifest: Manifest, emulator: Emulator) -> Step:
    calibration = emulator.calibration
    model = model_source(manifest)
    is_local = Path(model.text).is_absolute()

    def size() -> Size:
        from onelayer.compiler.storage.checkpoint import resolve_model

        return emulator_size(manifest, resolve_model(model.text, model.revision))

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import compile_emulator

        chosen = size()
        result = compile_emulator(
            model.text,
            all_given("calibration", calibration.data, inputs),
            output,
            **_form_keywords(emulator, chosen),
            samples=calibration.samples,
            **calibration.lengths(),
            batch_size=manifest.stream.batch_size,
            device=manifest.stream.device,
            seed=manifest.seed,
            revision=model.revision,
        )
        return result.model_dump(mode="json")

    fields = {
        **_size_fields(manifest, emulator),
        # Omitted if it is not set, so that results from before the field existed are found.
        **({} if emulator.factor_dtype is None else {"factor_dtype": emulator.factor_dtype}),
        **({} if emulator.allocation == "uniform" else {"rank_allocation": emulator.allocation}),
        **_form_fields(manifest, emulator),
        # Emulators from before have dense projectors. Other models have none, and keep their keys.
        **({"projectors": "compiled"} if manifest.images is None and holds_projectors(model) else {}),
        "samples": calibration.samples,
        **calibration.lengths(),
        "seed": manifest.seed,
        # A Hub id is written into emulator and adapter, so it is part of the result; a local folder may move.
        "model": None if is_local else model.text,
        "revision": None if is_local else model.revision,
    }
    sources = {"model": model, **calibration_sources(emulator)}
    passes = manifest.stream.model_dump(mode="json")
    return Step("compile", "compile", execute, fields, sources, ratio=lambda: size().ratio, passes=passes)


def _form_keywords(emulator: Emulator, size: Size) -> dict[str, Any]:
    """Say how large the emulator is and what it is made of."""
    if not size.coded:
        return {**size.compile_settings(emulator.allocation), "form": "factors", "backward": emulator.backward}
    given = size.compile_settings(emulator.allocation) if emulator.memory is not None else {}
    return {"keep_bytes": emulator.share, **given, "form": emulator.form, "backward": emulator.backward}


def _may_be_coded(manifest: Manifest, emulator: Emulator) -> bool:
    """Whether the emulator becomes codes if the model and the memory allow it."""
    return manifest.prefers_codes or (emulator.memory is not None and manifest.may_be_coded)


def _form_fields(manifest: Manifest, emulator: Emulator) -> dict[str, Any]:
    """Return what decides the form; nothing if it can only be factors without a pass back, as before it existed."""
    if not _may_be_coded(manifest, emulator):
        return {"backward": True} if emulator.backward else {}
    return {"form": emulator.form, "backward": emulator.backward is not False}


def _size_fields(manifest: Manifest, emulator: Emulator) -> dict[str, Any]:
    """Return what decides the size: a ratio, a share of bytes, or a memory budget with all that the planner sees."""
    if emulator.ratio is not None:
        return {"ratio": emulator.ratio}
    if emulator.memory is None:
        return {"keep_bytes": emulator.share}
    return {"memory": emulator.memory, "planned": {"version": PLANNER_VERSION, "tasks": runs_in_key(manifest)}}


def _slice_step(ratio: float) -> Step:
    """Slice a smaller emulator off the common one, without the original."""

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import slice_emulator

        return slice_emulator(inputs["emulator"], ratio=ratio, output=output).model_dump(mode="json")

    return Step(f"slice {ratio}", "slice", execute, {"ratio": ratio}, {}, needs={"emulator": "compile"})


def refine_step(manifest: Manifest, emulator: Emulator, refine: Refine, ratio: float | None) -> Step:
    """Refine the common emulator, or its slice of `ratio`, on its calibration data."""
    model, calibration = model_source(manifest), emulator.calibration
    settings = refine.model_dump(mode="json")

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import refine_emulator

        result = refine_emulator(
            inputs["emulator"],
            model=model_path(model),
            calibration=all_given("calibration", calibration.data, inputs),
            output=output,
            **calibration.lengths(),
            device=manifest.stream.device,
            seed=manifest.seed,
            **settings,
        )
        return result.model_dump(mode="json")

    fields = {
        **refine.recorded(),
        # What the form decides may depend on the model.
        **({name: getattr(refine, name) or "auto" for name in BY_FORM} if _may_be_coded(manifest, emulator) else {}),
        **calibration.lengths(),
        "seed": manifest.seed,
        **({} if ratio is None else {"ratio": ratio}),
    }
    sources = {"model": model, **calibration_sources(emulator)}
    base, name = ("compile", "refine") if ratio is None else (f"slice {ratio}", f"refine {ratio}")
    passes = {"device": manifest.stream.device}
    return Step(name, "refine", execute, fields, sources, needs={"emulator": base}, passes=passes)


def calibration_sources(emulator: Emulator) -> dict[str, Source]:
    """Map the roles in a step to the calibration data."""
    return {f"calibration {index}": Source.of(data) for index, data in enumerate(emulator.calibration.data, start=1)}
