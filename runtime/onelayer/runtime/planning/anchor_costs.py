"""Predicts what anchored training costs by the steps between renewals: bytes read, seconds, waiting offsets, peak."""

from collections.abc import Callable

from onelayer.compiler.factors.stored_forms import residual_bytes
from onelayer.compiler.results import Result, round_significant
from onelayer.runtime.anchors.settings import ANCHOR_EVERY
from onelayer.runtime.planning.coded import largest_decoding_bytes
from onelayer.runtime.planning.pass_memory import anchor_bytes
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.speed import FORWARD, SECONDS_DIGITS, Speed
from onelayer.runtime.planning.train_memory import PlannedRun, TrainMemory, active_values
from onelayer.runtime.training.settings import TrainSettings

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
    emulator = FORWARD * active_values(shapes, ratio, planned.coded) * planned.tokens / speed.flops_per_second
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


def renewal_bytes(shapes: ModelShapes, memory: TrainMemory, planned: PlannedRun) -> int:
    """Bound what a renewal holds on the device: emulator and adapter, a block of the original and its workspace."""
    decoding = largest_decoding_bytes(shapes) if planned.coded else 0
    return memory.emulator + memory.adapter + decoding + anchor_bytes(shapes, planned.tokens, planned.on_gpu)
