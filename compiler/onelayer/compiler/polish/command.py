"""Polish: a few exact LoRA steps on the original, with one layer of it in memory.

In: a checkpoint, an adapter (or none), training data. Out: an adapter of the original, in the form of `correct`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from onelayer.compiler.adapters.attach import Adapted
from onelayer.compiler.adapters.replacements import replaced_bytes, replaced_values
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.units import Unit
from onelayer.compiler.polish.job import PolishJob, polish_workspace
from onelayer.compiler.polish.resume import POLISH_WORK, PolishState
from onelayer.compiler.polish.settings import PolishKeywords, PolishSettings
from onelayer.compiler.polish.task import PolishTask
from onelayer.compiler.polish.trained_adapter import NAME, FreshAdapter
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
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
    """What polish made. `chosen_step` is the step after which the published adapter was the best on held-out data.

    `gradient_cosine` compares gradients with compressed and with exact unit inputs, if they are compressed.
    `kept_bytes` is the most host memory of kept unit inputs, `spilled_bytes` what went to files beyond the budget.
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


@settings_keywords(PolishSettings, PolishKeywords)
def polish_adapter(
    adapter: str | Path | None,
    *,
    model: str | Path,
    data: DataSource,
    output: str | Path,
    eval_data: DataSource | None = None,
    **settings: Unpack[PolishKeywords],
) -> PolishResult:
    """Train a LoRA adapter of `model` by exact steps, each of `batch_size` examples, and write it to `output`.

    `adapter` may be corrected or not, or any plain LoRA of the original. With None a fresh one of `lora_rank` is
    trained, on every linear unless `target_modules` are given. With `eval_data`, its loss is measured every
    `eval_steps` steps and the best adapter is published. Unit inputs are kept exactly, or with `activations` as
    factors of that rank (or share of the features) and two bits for each value's residual. With `packing`, short
    examples share rows of up to `max_length` tokens without seeing each other: the gradient is the same, and a
    model that does not keep them apart is refused. A stopped run resumes after its last finished step. Raises
    `InputError` for what the caller can fix, and `RuntimeError` if the loss is not finite; `output` then holds what
    the earlier steps made.
    """
    asked = PolishSettings.of(settings)
    check_output(Path(output), adapter, model)
    start = _start(adapter, asked)
    device, spill_pool = pick_device(asked.device), SpillPool(asked.host_memory_bytes)
    task = PolishTask.read(model, start, data, eval_data, asked, device)
    begun, team = work_directory(Path(output), POLISH_WORK, task.identity, asked.resume), processes()
    with StopRequest() as stop, begun as work, Meter(device) as meter:
        team.by_first(lambda: task.make_start(work))
        opened, adapted, state = task.open(work)
        streamed = adapted.streamed
        state.restore(work)
        team.wait()  # a process that fails from here on may remove what others would still read
        on_unit = _on_unit(adapted, stop)
        stream = GradientStream(streamed, device, meter, on_unit=on_unit, spill_pool=spill_pool, team=team)
        held_out = task.held_out_batches(streamed.config)
        save = partial(task.save, state, work)
        job = PolishJob(stream, state, task.rows, held_out, asked, lambda: team.by_first(save))
        failure = job.run()

        def publish() -> PolishResult:
            task.publish(Path(output), opened, streamed, state, failure)
            workspace = polish_workspace(streamed, stream.loads, state, meter.on_gpu)
            workspace += replaced_bytes(streamed, adapted.replacements)
            workspace += streamed.host_bytes(meter.on_gpu)
            report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
            return _result(Path(output), state, job, report)

        result = team.by_first(publish)
    if failure is not None:
        raise RuntimeError(f"{failure}; {output} holds the adapter of the {len(state.steps)} steps before it")
    return result


def _start(adapter: str | Path | None, settings: PolishSettings) -> str | Path | FreshAdapter:
    """Return the adapter to start from, or the settings of a fresh one. Raises `InputError` unless one is given."""
    rank, alpha, targets = settings.lora_rank, settings.lora_alpha, settings.target_modules
    if adapter is None and rank is None:
        raise InputError("polish: give either an adapter, or --lora-rank for a fresh one")
    if adapter is not None:
        for option, value in (("--lora-rank", rank), ("--lora-alpha", alpha), ("--target-modules", targets)):
            if value is not None:
                raise InputError(f"{option}: is for a fresh adapter, {adapter} has its own; give either of them")
        return adapter
    assert rank is not None
    return FreshAdapter(rank, rank if alpha is None else alpha, targets or "all-linear", settings.seed)


def _on_unit(adapted: Adapted, stop: StopRequest) -> Callable[[Unit], Any]:
    """Put what the adapter replaces into every unit, and let a stop take effect after it, losing the present step."""

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        with replaced_values(adapted.streamed, unit, adapted.replacements) as put_values:
            put_values(NAME)
            yield
        stop.check()

    return on_unit


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
