"""Compares the ways to train an adapter: on the original, in memory or streamed, and on an emulator, anchored or not.

In: shapes, the best emulator, memory of device and host, speeds. Out: for each way whether it fits, what a step reads
and takes, and what has to be done once; for anchors also by the steps between renewals. Reading and computing overlap
within a pass, so the slower counts. An exact step reads twice what the host does not keep.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from onelayer.compiler.factors.stored_forms import residual_bytes
from onelayer.compiler.results import Result, round_significant
from onelayer.runtime.anchors.settings import ANCHOR_EVERY
from onelayer.runtime.planning.choice import (
    LARGEST_RATIO,
    SMALLEST_RATIO,
    STEPS,
    USABLE_SHARE,
    Choice,
    activation_choices,
)
from onelayer.runtime.planning.coded import LEAST_RATIO, coded_emulator
from onelayer.runtime.planning.pass_memory import PROCESS_BYTES, renewal_bytes, streamed_bytes
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import (
    BACKWARD,
    FORWARD,
    RECOMPUTE,
    SECONDS_DIGITS,
    Seconds,
    Speed,
    emulator_seconds,
)
from onelayer.runtime.planning.train_memory import (
    PlannedRun,
    TrainMemory,
    emulator_bytes,
    train_memory,
)
from onelayer.runtime.training.settings import TrainSettings

# The exact ways go first, so that they are named if another one is as fast.
WayName = Literal["resident", "streamed", "anchored", "emulator"]
SHOWN_STEPS = (1, 3, ANCHOR_EVERY, 40)
BITS = TrainSettings.default("anchor_bits")


class AnchorCost(Result):
    """The cost of a renewal every `every` steps of one batch each, in addition to training without anchors.

    `offset_bytes` wait on the host, or beyond its budget in files. `peak_bytes` is the device peak of a renewal, the
    emulator included. `seconds_per_step` is None if no speed is known.
    """

    every: int
    read_bytes_per_step: int
    seconds_per_step: float | None
    offset_bytes: int
    peak_bytes: int


class AnchorChoice(Result):
    """The steps between renewals of a training of `steps` steps, and the seconds that it takes with them.

    `every` is None if not even one renewal for all steps fits into `limit_seconds`; `seconds` are then without anchors.
    """

    steps: int
    limit_seconds: float
    every: int | None
    seconds: float


def anchor_seconds(shapes: ModelShapes, ratio: float, planned: PlannedRun, speed: Speed, every: int) -> float:
    """Predict the seconds that anchors add to a step.

    Reading and computing of the original overlap; the emulator's units run on the same rows.
    """
    original = FORWARD * shapes.active_parameters * planned.tokens / speed.flops_per_second
    emulator = FORWARD * planned.tokens * emulator_seconds(speed, shapes, ratio, planned.coded)
    return max(shapes.stored_bytes / speed.read_bytes_per_second / every, original) + emulator


def choose_every(step_seconds: float, anchor_seconds: Callable[[int], float], steps: int, limit: float) -> AnchorChoice:
    """Choose the least number of steps between renewals that fits into `limit` seconds, but none below the default.

    More renewals than that gain nothing. `anchor_seconds` tells what anchors add to a step.
    """

    def total(every: int) -> float:
        return steps * (step_seconds + anchor_seconds(every))

    allowed = range(min(ANCHOR_EVERY, steps), steps + 1)
    every = next((each for each in allowed if total(each) <= limit), None)
    seconds = steps * step_seconds if every is None else total(every)
    rounded = round_significant(seconds, SECONDS_DIGITS)
    return AnchorChoice(steps=steps, limit_seconds=limit, every=every, seconds=rounded)


def anchor_costs(
    shapes: ModelShapes, ratio: float, planned: PlannedRun, memory: TrainMemory, speed: Speed | None
) -> list[AnchorCost]:
    """Predict the costs of some numbers of steps between renewals."""
    model = shapes.stored_bytes
    waiting = len(shapes.blocks) * residual_bytes(planned.tokens, shapes.hidden, BITS)

    def seconds(every: int) -> float | None:
        if speed is None:
            return None
        return round_significant(anchor_seconds(shapes, ratio, planned, speed, every), SECONDS_DIGITS)

    return [
        AnchorCost(
            every=every,
            read_bytes_per_step=model // every,
            seconds_per_step=seconds(every),
            offset_bytes=every * waiting,
            peak_bytes=renewal_bytes(shapes, memory, planned),
        )
        for every in SHOWN_STEPS
    ]


def with_room(shapes: ModelShapes, choice: Choice, missing_bytes: int) -> Choice:
    """Return the choice with an emulator that is smaller by at least `missing_bytes`; its ratio is None if none is."""
    if missing_bytes <= 0 or choice.ratio is None:
        return choice
    allowed, coded = choice.memory.emulator - missing_bytes, choice.stored == "coded"
    least = math.ceil(LEAST_RATIO * STEPS) if coded else round(SMALLEST_RATIO * STEPS)
    steps = range(least, min(round(choice.ratio * STEPS), round(LARGEST_RATIO * STEPS) + 1))

    def held(step: int) -> int:
        return emulator_bytes(shapes, step / STEPS, choice.stored)

    for step in reversed(steps[: bisect_right(steps, allowed, key=held)]):
        if not coded or coded_emulator(shapes, step / STEPS) is not None:
            return replace(choice, ratio=step / STEPS, memory=replace(choice.memory, emulator=held(step)))
    return replace(choice, ratio=None)


class WayCost(Result):
    """The cost of one way. `peak_bytes` is that of the device, `cache_bytes` what the host keeps of the original.

    `once_seconds` are those of the passes before and after training: compile, refinement if it trains without anchors,
    correction. Seconds are None if no speed is known.
    """

    way: WayName
    fits: bool
    peak_bytes: int
    read_bytes_per_step: int
    cache_bytes: int = 0
    seconds_per_step: float | None = None
    once_seconds: float | None = None

    def seconds(self, steps: int | None) -> float | None:
        """Return the seconds of a training of so many steps; of one step alone if their number is not known."""
        if self.seconds_per_step is None or self.once_seconds is None:
            return None
        return self.seconds_per_step if steps is None else self.once_seconds + steps * self.seconds_per_step


def way_costs(
    shapes: ModelShapes,
    choice: Choice,
    memory_bytes: int,
    host_memory_bytes: int | None,
    speed: Speed | None,
    seconds: Seconds | None,
) -> list[WayCost]:
    """Predict the cost of every way for the batches of `choice`, the best emulator. `seconds` are its durations."""
    usable = int(memory_bytes * USABLE_SHARE)
    exact = [_resident(shapes, choice.planned, usable, speed)]
    if shapes.positions is None:  # a denoiser's exact steps are those of a polish
        exact.append(_streamed(shapes, choice.planned, usable, host_memory_bytes, speed))
    step = once = anchored_once = anchors = None
    anchored = with_room(shapes, choice, renewal_bytes(shapes, choice.memory, choice.planned) - usable)
    if speed is not None and seconds is not None:
        step, anchored_once = seconds.train_step, seconds.compile + seconds.correct
        once = anchored_once + seconds.refine
        ratio = anchored.ratio or SMALLEST_RATIO
        anchors = _rounded(step + anchor_seconds(shapes, ratio, choice.planned, speed, ANCHOR_EVERY))
    peak = max(anchored.memory.peak, renewal_bytes(shapes, anchored.memory, choice.planned))
    read = shapes.stored_bytes // ANCHOR_EVERY
    return [
        *exact,
        _way("anchored", anchored.ratio is not None and peak <= usable, peak, read, anchors, anchored_once),
        _way("emulator", choice.ratio is not None, choice.memory.peak, 0, step, once),
    ]


def fastest_way(ways: Sequence[WayCost], steps: int | None) -> WayName | None:
    """Name the way that fits and takes the least time for so many steps; of equal ones the exact one."""
    times = {way.way: way.seconds(steps) for way in ways if way.fits}
    known = {name: round_significant(time, SECONDS_DIGITS) for name, time in times.items() if time is not None}
    return min(known, key=lambda name: known[name], default=None)


def _way(
    name: WayName, fits: bool, peak: int, read: int, step: float | None, once: float | None, cache: int = 0
) -> WayCost:
    return WayCost(
        way=name,
        fits=fits,
        peak_bytes=peak,
        read_bytes_per_step=read,
        cache_bytes=cache,
        seconds_per_step=step,
        once_seconds=once,
    )


def _rounded(seconds: float) -> float:
    return round_significant(seconds, SECONDS_DIGITS)


def _resident(shapes: ModelShapes, planned: PlannedRun, usable: int, speed: Speed | None) -> WayCost:
    """Hold the original whole, with the most exact way to store activations that fits.

    A quantized one is not held: its weights are unpacked as they stream.
    """
    runs = [replace(run, coded=False) for run in activation_choices(planned)]
    peaks = {run: train_memory(shapes, shapes.unpacked_bytes, run).peak for run in runs}
    run = next((run for run in runs if peaks[run] <= usable), min(runs, key=lambda run: peaks[run]))
    fits = peaks[run] <= usable and shapes.packed_bytes is None
    if speed is None:
        return _way("resident", fits, peaks[run], 0, None, None)
    passes = FORWARD + BACKWARD + (RECOMPUTE if run.where != "none" else 0)
    step = passes * shapes.active_parameters * planned.tokens / speed.flops_per_second
    once = shapes.stored_bytes / speed.read_bytes_per_second
    return _way("resident", fits, peaks[run], 0, _rounded(step), _rounded(once))


def _streamed(
    shapes: ModelShapes, planned: PlannedRun, usable: int, host_memory_bytes: int | None, speed: Speed | None
) -> WayCost:
    """Read the original twice in every step, without what the host keeps of it; rows are computed one at a time."""
    peak = streamed_bytes(shapes, planned)
    cache = 0 if host_memory_bytes is None else _cache_bytes(shapes, planned, host_memory_bytes)
    kept = cache * shapes.stored_bytes // shapes.unpacked_bytes  # the cache holds layers as they are unpacked
    pass_bytes = shapes.stored_bytes - kept
    step = None
    if speed is not None:
        read = pass_bytes / speed.read_bytes_per_second
        forward = shapes.active_parameters * planned.tokens / speed.flops_per_second
        step = _rounded(max(read, FORWARD * forward) + max(read, (RECOMPUTE + BACKWARD) * forward))
    return _way("streamed", peak <= usable, peak, 2 * pass_bytes, step, None if speed is None else 0.0, cache)


def _cache_bytes(shapes: ModelShapes, planned: PlannedRun, host_memory_bytes: int) -> int:
    """Return what is left of the host's memory for layers.

    The process, the layer that is read ahead and the inputs of layers that wait for the way back go first.
    """
    waiting = (len(shapes.blocks) + 1) * planned.tokens * shapes.hidden * shapes.value_bytes
    reading = 2 * shapes.largest_block_bytes + shapes.unpacking_bytes
    return min(shapes.unpacked_bytes, max(0, host_memory_bytes - PROCESS_BYTES - reading - waiting))
