"""Polish: a few exact LoRA steps on the original, with one layer of it in memory.

In: a checkpoint, an adapter (or none), training data. Out: an adapter of the original, in the form of `correct`.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.linears import widest
from onelayer.compiler.polish.job import PolishJob, polish_workspace
from onelayer.compiler.polish.resume import POLISH_WORK, PolishState
from onelayer.compiler.polish.settings import PolishSettings
from onelayer.compiler.polish.task import PolishTask
from onelayer.compiler.polish.trained_adapter import FreshAdapter
from onelayer.compiler.results import Report, Result
from onelayer.compiler.storage.files import check_output
from onelayer.compiler.storage.work_directory import work_directory
from onelayer.compiler.streaming.gradient_stream import GradientStream
from onelayer.compiler.streaming.spill import SpillPool


class PolishStep(Result):
    """Figures of one exact step: mean loss of its batch before the step, and what the step cost.

    `sequences` counts the rows that the model was run on: the examples, or what they were packed into.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    sequences: int
    seconds: float
    bytes_read: int


class HeldOutLoss(Result):
    """Loss on held-out data after a number of steps."""

    step: int
    loss: float


class PolishResult(Result):
    """What polish made. `chosen_step`: after how many steps the adapter handed out was the best on held-out data.

    `gradient_cosine`: between gradients with compressed and with exact unit inputs, where they are compressed.
    `kept_bytes` is the host memory of kept unit inputs at most, `spilled_bytes` what went to files beyond the budget.
    """

    output: str
    steps: list[PolishStep]
    held_out: list[HeldOutLoss]
    chosen_step: int
    gradient_cosine: float | None
    trainable_parameters: int
    kept_bytes: int
    spilled_bytes: int
    report: Report


def polish_adapter(
    adapter: str | Path | None,
    *,
    model: str | Path,
    data: DataSource,
    output: str | Path,
    steps: int = 10,
    batch_size: int = 64,
    micro_batch_size: int = 1,
    learning_rate: float = 1e-3,
    warmup_steps: int = 0,
    max_gradient_norm: float = 1.0,
    max_length: int = 512,
    eval_data: DataSource | None = None,
    eval_steps: int = 1,
    activations: int | float | Literal["exact"] = "exact",
    packing: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    target_modules: str | list[str] | None = None,
    device: str | None = None,
    host_memory_bytes: int | None = None,
    seed: int = 0,
    resume: bool = True,
    revision: str | None = None,
) -> PolishResult:
    """Train a LoRA adapter of `model` by exact steps, each of `batch_size` examples, and write it to `output`.

    `adapter` may be corrected or not, or any plain LoRA of the original; with None a fresh one of `lora_rank` is
    trained, of every linear where there are no `target_modules`. With `eval_data`, its loss is measured every
    `eval_steps` steps and the best adapter is handed out. Unit inputs are kept as they are, or with `activations` as
    factors of that rank (or share of the features) and two bits for what they leave of each value. With `packing`,
    short examples share rows of up to `max_length` tokens without seeing each other: the gradient is the same, and a
    model that does not keep them apart is refused. A run that was stopped goes on behind its last finished step. Raises
    `InputError` for what the caller can mend, and `RuntimeError` where the loss is lost; what the steps before it made
    is then in `output`.
    """
    rank = None if activations == "exact" else activations
    pace = (steps, batch_size, micro_batch_size, learning_rate, warmup_steps, max_gradient_norm)
    settings = PolishSettings(*pace, max_length, eval_steps, rank, seed, packing)
    check_output(Path(output))
    start = _start(adapter, lora_rank, lora_alpha, target_modules, seed)
    place, spill_pool = pick_device(device), SpillPool(host_memory_bytes)
    task = PolishTask.read(model, revision, start, data, eval_data, settings, place)
    begun = work_directory(Path(output), POLISH_WORK, task.identity, resume)
    with StopRequest() as stop, begun as work, Meter(place) as meter:
        source, streamed, state = task.open(work)
        state.restore(work)
        stream = GradientStream(streamed, place, meter, on_unit=_stopping(stop), spill_pool=spill_pool)
        job = PolishJob(stream, state, task.rows, task.held_out_batches(streamed.config), settings, work)
        failure = job.run()
        task.publish(Path(output), source, streamed, state, failure)
        workspace = polish_workspace(streamed, widest(streamed), task.rows, settings, state, meter.on_gpu)
        report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
    if failure is not None:
        raise RuntimeError(f"{failure}; {output} holds the adapter of the {len(state.steps)} steps before it")
    return _result(Path(output), state, job, report)


def _start(
    adapter: str | Path | None,
    rank: int | None,
    alpha: float | None,
    target_modules: str | list[str] | None,
    seed: int,
) -> str | Path | FreshAdapter:
    """The adapter to begin with, or what a fresh one is like. Raises `InputError` where it is neither, or both."""
    if adapter is None and rank is None:
        raise InputError("polish: give either an adapter, or --lora-rank for a fresh one")
    if adapter is not None:
        for option, value in (("--lora-rank", rank), ("--lora-alpha", alpha), ("--target-modules", target_modules)):
            if value is not None:
                raise InputError(f"{option}: is for a fresh adapter, {adapter} has its own; give either of them")
        return adapter
    assert rank is not None
    if rank < 1:
        raise InputError(f"--lora-rank {rank}: must be at least 1")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"--lora-alpha {alpha}: must be a number greater than 0")
    targets = "all-linear" if target_modules is None else target_modules
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise InputError(
                f"--target-modules {targets}: no regular expression ({error}); give one, names, or all-linear"
            ) from None
    return FreshAdapter(rank, rank if alpha is None else alpha, targets, seed)


@contextmanager
def _watching(stop: StopRequest) -> Iterator[None]:
    yield
    stop.check()


def _stopping(stop: StopRequest) -> Any:
    """Lets a stop take effect at the next unit; the step in progress is lost."""
    return lambda unit: _watching(stop)


def _result(output: Path, state: PolishState, job: PolishJob, report: Report) -> PolishResult:
    best = min(state.held_out, key=lambda item: float(item["loss"]), default={"step": len(state.steps)})
    return PolishResult(
        output=str(output),
        steps=[PolishStep(**step) for step in state.steps],
        held_out=[HeldOutLoss(**item) for item in state.held_out],
        chosen_step=best["step"],
        gradient_cosine=state.gradient_cosine,
        trainable_parameters=sum(parameter.numel() for parameter in state.parameters.values()),
        kept_bytes=job.kept_bytes,
        spilled_bytes=job.stream.spill_pool.spilled_bytes,
        report=report,
    )
