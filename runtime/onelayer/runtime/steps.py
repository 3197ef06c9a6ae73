"""A manifest in, its steps out: what each step runs, which settings can change its result, and which inputs it reads.

Nothing here imports torch before a step executes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.runtime.manifest import Manifest
from onelayer.runtime.manifest_sections import Emulator, Lora, Training
from onelayer.runtime.plan_manifest import PLANNER_VERSION, Size, emulator_size, planned_settings
from onelayer.runtime.sources import Source
from onelayer.runtime.step_kinds import Step, emulator_step, fitting_step, model_source
from onelayer.runtime.steps_adapt import correct_step, evaluate_step, merge_step, polish_step
from onelayer.runtime.steps_refine import calibration_sources, refine_step
from onelayer.runtime.trainer_args import NON_SEMANTIC_ARGS


def steps_of(manifest: Manifest, tasks: list[str]) -> list[Step]:
    """The steps for the given tasks, each behind those it needs; the emulator is one step for all of them."""
    emulator = manifest.emulator
    steps = [] if emulator is None else [_compile_step(manifest, emulator)]
    ratios = dict.fromkeys(manifest.tasks[task].ratio for task in tasks)
    steps += [_slice_step(ratio) for ratio in ratios if ratio is not None]
    if emulator is not None and (refinement := emulator.refinement) is not None:
        steps += [refine_step(manifest, emulator, refinement, ratio) for ratio in ratios]
    for task in tasks:
        steps += _task_steps(manifest, task)
    return steps


def _compile_step(manifest: Manifest, emulator: Emulator) -> Step:
    calibration = emulator.calibration
    model = model_source(manifest)
    is_local = Path(model.text).is_absolute()

    def size() -> Size:
        from onelayer.compiler.checkpoint import resolve_model

        return emulator_size(manifest, resolve_model(model.text, model.revision))

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import compile_emulator

        chosen = size()
        result = compile_emulator(
            model.text,
            list(calibration.data),
            output,
            ratio=chosen.ratio,
            factor_dtype=chosen.factor_dtype,
            rank_allocation=emulator.allocation,
            samples=calibration.samples,
            max_length=calibration.max_length,
            batch_size=manifest.stream.batch_size,
            device=manifest.stream.device,
            seed=manifest.seed,
            revision=model.revision,
        )
        return result.model_dump(mode="json")

    fields = {
        **_size_fields(manifest, emulator),
        # Left out where there is none, so that results from before there was a choice are found.
        **({} if emulator.factor_dtype is None else {"factor_dtype": emulator.factor_dtype}),
        **({} if emulator.allocation == "uniform" else {"rank_allocation": emulator.allocation}),
        "samples": calibration.samples,
        "max_length": calibration.max_length,
        "seed": manifest.seed,
        # A Hub id is written into emulator and adapter, so it is part of the result; a local folder may move.
        "model": None if is_local else model.text,
        "revision": None if is_local else model.revision,
    }
    sources = {"model": model, **calibration_sources(emulator)}
    passes = manifest.stream.model_dump(mode="json")
    return Step("compile", "compile", execute, fields, sources, ratio=lambda: size().ratio, passes=passes)


def _size_fields(manifest: Manifest, emulator: Emulator) -> dict[str, Any]:
    """What decides the size: a ratio, a share of bytes, or a memory budget with all that the planner looks at."""
    if emulator.ratio is not None:
        return {"ratio": emulator.ratio}
    if emulator.memory is None:
        return {"keep_bytes": emulator.share}
    return {"memory": emulator.memory, "planned": {"version": PLANNER_VERSION, "tasks": planned_settings(manifest)}}


def _slice_step(ratio: float) -> Step:
    """A smaller emulator, cut out of the common one without the original."""

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import slice_emulator

        return slice_emulator(inputs["emulator"], ratio=ratio, output=output).model_dump(mode="json")

    return Step(f"slice {ratio}", "slice", execute, {"ratio": ratio}, {}, needs={"emulator": "compile"})


def _task_steps(manifest: Manifest, task: str) -> list[Step]:
    """What one task runs: training and correction, or training on the original itself; then what was asked for."""
    model = model_source(manifest)
    steps = []
    if manifest.emulator is not None:
        steps += [_train_step(manifest, task, direct=False), correct_step(manifest, task, model)]
    direct = [_train_step(manifest, task, direct=True)] if manifest.direct or manifest.emulator is None else []
    if manifest.emulator is None:
        steps += direct
    if (polishing := manifest.polishing(task)) is not None:
        steps.append(polish_step(manifest, task, model, polishing))
    if manifest.emulator is not None:
        steps += direct
    if manifest.tasks[task].merge:
        adapter = fitting_step(manifest, task) if polishing is None else f"{task}.polish"
        steps.append(merge_step(task, model, adapter))
    if manifest.tasks[task].test is not None:
        steps.append(evaluate_step(manifest, task, model))
    return steps


def _train_step(manifest: Manifest, task: str, direct: bool) -> Step:
    """LoRA on the emulator, or with `direct` on the original itself (the upper bound; it must fit in memory)."""
    training = manifest.training(task)
    model, data = model_source(manifest), Source(manifest.tasks[task].train)

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
    needs = {"emulator": emulator_step(manifest, task)}
    return Step(f"{task}.train", "train", execute, fields, {"train data": data}, needs=needs, task=task)


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
