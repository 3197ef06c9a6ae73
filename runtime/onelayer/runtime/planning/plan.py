"""Plans for a memory budget: whether compile, train and correct fit, with which settings, and at what cost.

Reads headers and config.json only; no weight is loaded. Predictions count the bytes of tensors. A test and
`scripts/plan/measure.py` compare them with counts of live tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from onelayer.compiler.compile.settings import CompileSettings, Form
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import Allocation, copies_on_disk
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.polish.settings import PolishSettings
from onelayer.compiler.results import Result
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.runtime.planning.choice import (
    SMALLEST_RATIO,
    Alternative,
    Choice,
    Size,
    alternatives,
    choose_each,
    chosen_form,
    limiting_pass,
    remarks,
)
from onelayer.runtime.planning.media import Media
from onelayer.runtime.planning.pass_memory import host_bytes, pass_bytes
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.spectra import FactorChoice, factor_choice, read_spectra
from onelayer.runtime.planning.speed import Seconds, Speed, measured_speed, seconds_at
from onelayer.runtime.planning.train_memory import PlannedRun, Stored, emulator_bytes
from onelayer.runtime.planning.ways import (
    AnchorChoice,
    AnchorCost,
    WayCost,
    WayName,
    anchor_costs,
    anchor_seconds,
    choose_every,
    fastest_way,
    way_costs,
)
from onelayer.runtime.training.settings import TrainSettings

SAMPLES = CompileSettings.default("samples")
MAX_LENGTH, BATCH_SIZE, LORA_RANK = (TrainSettings.default(name) for name in ("max_length", "batch_size", "lora_rank"))
POLISH_BATCH = PolishSettings.default("batch_size")


class Predicted(Result):
    """Predicted device peak, host peak and disk size. `read_bytes` is one pass over the original."""

    compile_bytes: int
    refine_bytes: int
    train_bytes: int
    correct_bytes: int
    emulator_bytes: int
    host_bytes: int
    disk_bytes: int
    read_bytes: int
    model_bytes: int
    largest_layer_bytes: int


class TrainParts(Result):
    """The parts of the training peak, in bytes."""

    emulator: int
    adapter: int
    saved_activations: int
    loss: int
    one_layer_backward: int


class PlanResult(Result):
    """What fits in `memory_bytes`; `ratio` is None if nothing does. `bf16` means the original's own dtype.

    `form`, `factor_dtype`, `ratio` and `keep_bytes` are those of the best choice, as in `FactorChoice`. `fastest` is
    the one of `ways` that fits and takes the least time; None if no speed is known. `positions` are those of a picture
    with its prompt, for a denoiser.
    """

    model: str
    memory_bytes: int
    max_length: int
    batch_size: int
    fits: bool
    form: str
    ratio: float | None
    keep_bytes: float | None
    factor_dtype: FactorDtype
    activations: str
    activation_rank: float | None
    predicted: Predicted
    train_parts: TrainParts
    limit: str
    give_up: list[Alternative]
    choices: list[FactorChoice]
    speed: Speed | None
    seconds: Seconds | None
    anchored: list[AnchorCost]
    anchor_choice: AnchorChoice | None
    ways: list[WayCost]
    fastest: WayName | None
    media: Media | None
    positions: int | None = None
    remarks: list[str]


def plan_run(
    model: str | Path,
    memory_bytes: int,
    *,
    max_length: int = MAX_LENGTH,
    batch_size: int = BATCH_SIZE,
    lora_rank: int = LORA_RANK,
    images: int = 1,
    image_side: int | None = None,
    factor_dtype: FactorDtype | None = None,
    form: Form = "auto",
    on_gpu: bool = True,
    emulator: str | Path | None = None,
    max_steps: int | None = None,
    hours: float | None = None,
    host_memory_bytes: int | None = None,
    speed: Speed | None = None,
    timing: bool = True,
    revision: str | None = None,
) -> PlanResult:
    """Plan for a device with `memory_bytes`. `model` may be a directory with only a config.json and no weights.

    `factor_dtype` fixes how factors are stored and `form` whether there are factors or codes; None and "auto" choose
    them together with the ratio. An example of a model that reads images has `images` of them, tiles counted, with
    sides of `image_side` pixels or as the tower is made for. `emulator` is an emulator of this model: its spectra
    predict what each choice would lose. With `max_steps` and `hours` the plan chooses how often anchors are renewed.
    `host_memory_bytes` is what a streamed training may use of the host: it keeps the layers that fit. Durations follow
    from `speed`, by default measured for a second on this machine (not if `timing` is false or there are no weights to
    read). Raises `InputError` for bad input.
    """
    _check_positive(memory_bytes, max_length - 1, batch_size, lora_rank, images, image_side or 1)
    directory = resolve_model(model, revision)
    shapes = read_shapes(directory, images, image_side)
    if shapes.positions is not None:  # a denoiser computes one picture at a time
        max_length, batch_size = shapes.positions, 1
    shapes, planned = shapes.at_length(max_length), PlannedRun(batch_size, max_length, lora_rank, on_gpu=on_gpu)
    choices = choose_each(shapes, planned, memory_bytes)
    best = choices[chosen_form(choices, factor_dtype, form)]
    speed = speed or (measured_speed(directory, shapes, planned.tokens) if timing else None)
    seconds = None if speed is None else _seconds(shapes, best, speed)
    ways = way_costs(shapes, best, memory_bytes, host_memory_bytes, speed, seconds)
    return PlanResult(
        model=str(model),
        memory_bytes=memory_bytes,
        **_chosen(best),
        predicted=predict(shapes, best),
        train_parts=_parts(best),
        limit=limiting_pass(shapes, best, memory_bytes),
        give_up=alternatives(shapes, best, memory_bytes),
        choices=_choices(shapes, choices, emulator),
        speed=speed,
        seconds=seconds,
        anchored=anchor_costs(shapes, best.ratio or SMALLEST_RATIO, best.planned, best.memory, speed),
        anchor_choice=_anchor_choice(shapes, best, speed, max_steps, hours),
        media=shapes.media,
        positions=shapes.positions,
        ways=ways,
        fastest=fastest_way(ways, max_steps),
        remarks=remarks(shapes, best, planned.max_length, memory_bytes),
    )


def _choices(shapes: ModelShapes, choices: Mapping[Stored, Choice], emulator: str | Path | None) -> list[FactorChoice]:
    spectra = None if emulator is None else read_spectra(Path(emulator))
    return [factor_choice(shapes, choice, spectra) for choice in choices.values()]


def _check_positive(*numbers: int) -> None:
    if min(numbers) < 1:
        raise InputError(
            "--memory, --batch-size, --max-length, --images and --image-side must be positive, with at least two tokens"
        )


def _chosen(best: Choice) -> dict[str, Any]:
    """Return the fields of a result that name its best choice, and its batches."""
    return {
        "max_length": best.planned.max_length,
        "batch_size": best.planned.batch_size,
        "fits": best.ratio is not None,
        "form": best.form,
        "ratio": best.ratio,
        "keep_bytes": best.keep_bytes,
        "factor_dtype": best.factor_dtype,
        "activations": best.planned.where,
        "activation_rank": best.planned.rank,
    }


def size_for(
    model: str | Path,
    memory_bytes: int,
    factor_dtype: FactorDtype | None = None,
    rank_allocation: Allocation | None = None,
    *,
    form: Form = "auto",
    compile_tokens: int | None = None,
) -> Size:
    """Choose the size for `compile --memory`: the best that training fits with too, as `plan_run` does.

    The compile computes `compile_tokens` at once, by default one example of 512. What is given is kept: a dtype or
    an allocation of ranks means factors. Raises `InputError` if nothing fits.
    """
    shapes = read_shapes(resolve_model(model))
    batch, length = (BATCH_SIZE, MAX_LENGTH) if shapes.positions is None else (1, shapes.positions)
    shapes = shapes.at_length(length)
    if form == "auto" and rank_allocation is not None:
        form = "factors"
    allocation = rank_allocation or "spectrum"
    planned = PlannedRun(batch, length, allocation=allocation, compile_tokens=compile_tokens)
    choices = choose_each(shapes, planned, memory_bytes)
    best = choices[chosen_form(choices, factor_dtype, form)]
    if best.ratio is None:
        reason = limiting_pass(shapes, best, memory_bytes)
        raise InputError(
            f"--memory: too little for {reason}, when training has {batch} x {length} tokens at once; give more "
            "memory, or --keep-bytes with what `onelayer plan --batch-size --max-length` finds for less"
        )
    return best.size if factor_dtype is None else replace(best.size, factor_dtype=factor_dtype)


def predict(shapes: ModelShapes, choice: Choice) -> Predicted:
    """Predict the bytes of one choice."""
    ratio = choice.ratio or SMALLEST_RATIO
    planned = choice.planned
    emulator = emulator_bytes(shapes, ratio, choice.stored)
    model = shapes.stored_bytes
    copies = copies_on_disk("uniform" if planned.coded else planned.allocation, choice.factor_dtype != "bf16")
    compiled = max(emulator, copies * emulator_bytes(shapes, planned.widest(ratio), choice.stored))
    passes = pass_bytes(shapes, ratio, planned)
    return Predicted(
        compile_bytes=passes["compile"],
        refine_bytes=passes["refine"],
        train_bytes=choice.memory.peak,
        correct_bytes=passes["correct"],
        emulator_bytes=emulator,
        host_bytes=host_bytes(shapes, SAMPLES, planned.max_length, ratio),
        disk_bytes=model + compiled + 2 * choice.memory.adapter // 3,
        read_bytes=model,
        model_bytes=model,
        largest_layer_bytes=shapes.largest_block_bytes,
    )


def _anchor_choice(
    shapes: ModelShapes, choice: Choice, speed: Speed | None, max_steps: int | None, hours: float | None
) -> AnchorChoice | None:
    """Choose how often anchors are renewed in a training of so many steps; None if no time is given."""
    if max_steps is None and hours is None:
        return None
    if max_steps is None or hours is None or min(max_steps, hours) <= 0:
        raise InputError("--hours: chooses the anchors of a training of --max-steps; give both, above zero")
    if speed is None:
        raise InputError("--hours: needs weights to measure the speed of this machine with; give a model with some")
    per_step = partial(anchor_seconds, shapes, choice.ratio or SMALLEST_RATIO, choice.planned, speed)
    return choose_every(_seconds(shapes, choice, speed).train_step, per_step, max_steps, 3600 * hours)


def _parts(choice: Choice) -> TrainParts:
    memory = choice.memory
    return TrainParts(
        emulator=memory.emulator,
        adapter=memory.adapter,
        saved_activations=memory.saved,
        loss=memory.loss,
        one_layer_backward=memory.recompute,
    )


def _seconds(shapes: ModelShapes, choice: Choice, speed: Speed) -> Seconds:
    return seconds_at(
        speed,
        shapes,
        choice.planned,
        ratio=choice.ratio or SMALLEST_RATIO,
        samples=SAMPLES,
        polish_batch=POLISH_BATCH,
    )
