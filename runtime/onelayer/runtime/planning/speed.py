"""Measures how fast this machine reads and multiplies, and predicts how long passes over a model take."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from onelayer.compiler.codes.forms import group_size
from onelayer.compiler.correct.candidates import FIRST_ROWS, FIRST_SHARE, runs_per_row
from onelayer.compiler.refine.settings import RefineSettings
from onelayer.compiler.results import Result, round_significant
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import BUFFER_BYTES
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.train_memory import PlannedRun, active_values, factor_values

READ_SECONDS = 0.5
SECONDS_DIGITS = 2  # durations are rough
# Roughly what an eigenproblem of side s costs, divided by s**3, in operations at the measured rate.
EIGEN_FLOPS = 30
# What a search for the code of one value takes, in the same units: 0.7 microseconds of one core that does 35 in a
# nanosecond (manifests/LOG.md, codes whose windows overlap).
SEARCH_FLOPS = 25_000
# Arithmetic per parameter and token: forward, gradients of the inputs, and forward again if layers are recomputed.
FORWARD = BACKWARD = RECOMPUTE = 2
# The defaults of refine: its samples, and the samples of all steps of a layer together.
REFINE_SAMPLES = RefineSettings.default("samples")
REFINE_TRAINED = RefineSettings.default("steps") * RefineSettings.default("step_samples")
# From so many held-out rows on, a larger number of them costs no more runs for each.
CHOOSING_ROWS = round(FIRST_ROWS / FIRST_SHARE)


class Speed(Result):
    """Bytes read per second, multiplications and additions per second, and the device they were measured on.

    `flops_per_second` are those in whole weights with all that surrounds them in a layer; `factor_flops_per_second`
    those in low-rank factors, which are narrower. None: the same.
    """

    read_bytes_per_second: float
    flops_per_second: float
    device: str
    factor_flops_per_second: float | None = None

    @property
    def narrow_flops_per_second(self) -> float:
        """The rate in factors."""
        return self.factor_flops_per_second or self.flops_per_second


class Seconds(Result):
    """Rough durations of passes over the whole model, one training step, and one exact step with its two passes.

    `compile_backward` is the part of the compile that weighs errors by the loss's gradients; None if nothing is coded.
    `correct_1000_tokens` is what 1000 tokens of held-out data add to a correction that they choose, if there are
    `CHOOSING_ROWS` rows or more: all run through the original as it is and with the best candidates, a share of them
    with each. The original is then read once more.
    """

    compile: float
    compile_backward: float | None
    refine: float
    train_step: float
    correct: float
    correct_1000_tokens: float
    evaluate_1000_tokens: float
    polish_step: float


def try_speed(directory: Path, shapes: ModelShapes, tokens: int) -> Speed:
    """Measure reading a model's file and computing a block of its width, on `tokens` at once, for about two seconds."""
    import torch

    from onelayer.compiler.machine.devices import pick_device
    from onelayer.runtime.modules.block_speed import block_flops_per_second

    device = pick_device(None)
    dtype = torch.bfloat16 if shapes.value_bytes == 2 else torch.float32
    rate = partial(block_flops_per_second, device, dtype, width=shapes.hidden, tokens=tokens)
    return Speed(
        read_bytes_per_second=_try_reading(Checkpoint.open(directory).files[0]),
        flops_per_second=rate(),
        factor_flops_per_second=rate(factored=True),
        device=device.type,
    )


def measured_speed(directory: Path, shapes: ModelShapes, tokens: int) -> Speed | None:
    """Measure this machine over the weights of a model; None if there are none to read."""
    return try_speed(directory, shapes, tokens) if shapes.has_weights else None


def _try_reading(file: Path) -> float:
    """Measure bytes per second over the start of a file, after dropping it from the page cache if the system allows."""
    with open(file, "rb", buffering=0) as source:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        count, started = 0, time.perf_counter()
        for size in _blocks(source.fileno()):
            count += size
            if time.perf_counter() - started > READ_SECONDS:
                break
        return count / max(time.perf_counter() - started, 1e-9)


def _blocks(descriptor: int) -> Iterator[int]:
    while block := os.read(descriptor, BUFFER_BYTES):
        yield len(block)


def emulator_seconds(speed: Speed, shapes: ModelShapes, ratio: float, coded: bool) -> float:
    """Predict the seconds of one operation in each weight of an emulator. Codes are decoded to whole weights."""
    narrow = 0 if coded else factor_values(shapes, ratio)
    whole = active_values(shapes, ratio, coded) - narrow
    return whole / speed.flops_per_second + narrow / speed.narrow_flops_per_second


def coded_seconds(speed: Speed, shapes: ModelShapes, tokens: int) -> tuple[float, float]:
    """Predict what codes add to a compile: the search for codes with feedback, and the pass back over the samples."""
    linears = [(linear, 1) for block in shapes.blocks for linear in block.compressible]
    linears += [(stack, block.experts.count) for block in shapes.blocks if block.experts for stack in block.stacks]
    search = sum(
        count * linear.parameters * (SEARCH_FLOPS + group_size(linear.in_features)) for linear, count in linears
    )
    read = shapes.stored_bytes / speed.read_bytes_per_second
    back = (RECOMPUTE + BACKWARD) * shapes.active_parameters * tokens
    return search / speed.flops_per_second, max(read, back / speed.flops_per_second)


def seconds_at(
    speed: Speed, shapes: ModelShapes, planned: PlannedRun, *, ratio: float, samples: int, polish_batch: int
) -> Seconds:
    """Predict durations at a given speed. Reading and computing overlap within a pass, so the slower counts."""
    max_length, coded = planned.max_length, planned.coded
    flops = speed.flops_per_second
    read = shapes.stored_bytes / speed.read_bytes_per_second
    active = shapes.active_parameters
    sides = [min(linear.out_features, linear.in_features) for block in shapes.blocks for linear in block.compressible]
    moments = samples * max_length * 2 * sum(side * side for side in sides) + EIGEN_FLOPS * sum(s**3 for s in sides)
    for experts in (block.experts for block in shapes.blocks if block.experts is not None):
        for side in (min(stack.out_features, stack.in_features) for stack in experts.stacks):
            rows = samples * max_length * shapes.experts_per_token
            moments += rows * 2 * side * side + experts.count * EIGEN_FLOPS * side**3
    backward = coded_seconds(speed, shapes, samples * max_length) if coded else (0.0, 0.0)
    train = FORWARD + BACKWARD + (RECOMPUTE if planned.where != "none" else 0)
    exact_tokens = polish_batch * max_length
    runs = runs_per_row(CHOOSING_ROWS, FIRST_ROWS)
    # Factors are evaluated twice and trained, and codes run once more to give the next layer its inputs. A training
    # step runs forward, back to inputs and back to factors, at equal cost.
    refined_tokens = ((3 if coded else 2) * REFINE_SAMPLES + 3 * REFINE_TRAINED) * max_length
    return Seconds(
        compile=round_significant(
            max(read, (FORWARD * active * samples * max_length + moments) / flops) + sum(backward), SECONDS_DIGITS
        ),
        compile_backward=round_significant(backward[1], SECONDS_DIGITS) if coded else None,
        refine=round_significant(
            max(read, FORWARD * active * REFINE_SAMPLES * max_length / flops)
            + FORWARD * ratio * active * refined_tokens / (flops if coded else speed.narrow_flops_per_second),
            SECONDS_DIGITS,
        ),
        train_step=round_significant(
            train * planned.tokens * emulator_seconds(speed, shapes, ratio, coded), SECONDS_DIGITS
        ),
        correct=round_significant(read, SECONDS_DIGITS),
        correct_1000_tokens=round_significant(FORWARD * active * 1000 * runs / flops, SECONDS_DIGITS),
        evaluate_1000_tokens=round_significant(max(read, FORWARD * active * 1000 / flops), SECONDS_DIGITS),
        polish_step=round_significant(
            max(read, FORWARD * active * exact_tokens / flops)
            + max(read, (RECOMPUTE + BACKWARD) * active * exact_tokens / flops),
            SECONDS_DIGITS,
        ),
    )
