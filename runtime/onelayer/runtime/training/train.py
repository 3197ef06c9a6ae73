"""Trains a LoRA adapter on a directory that fits in memory: an emulator, or any plain model.

LoRA is PEFT's. The loop is TRL's, and for sequence classifiers transformers'. Every check runs before weights are read.
The work directory next to the output holds the checkpoints. The adapter appears in one rename, when it is complete.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import StopRequest, notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.results import Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.sources.data_set import data_sets
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import atomic_directory, check_output
from onelayer.compiler.storage.work_directory import work_directory
from onelayer.runtime.activations.report import ActivationReport
from onelayer.runtime.anchors.report import AnchorReport
from onelayer.runtime.training.checkpoints import (
    TRAINING_WORK,
    HeldOutScore,
    check_state,
    newest_checkpoint,
    read_first_batch,
)
from onelayer.runtime.training.inputs import TrainData, TrainModel, anchor_source, read_model, tokenized
from onelayer.runtime.training.settings import (
    INSTALL,
    LoraFields,
    TrainKeywords,
    TrainSettings,
    lora_fields,
    trainer_arguments,
)
from onelayer.runtime.training.trainer_args import NON_SEMANTIC_ARGS, TOOL_FILES

if TYPE_CHECKING:
    from onelayer.runtime.training.trainers import ClassTrainer, LoraTrainer


class TrainResult(Result):
    """The result of `train_lora`.

    `saved_activation_bytes`: what autograd keeps for one batch's backward pass, without parameters.
    `peak_device_bytes`: on a GPU the peak of its allocator, on a CPU the growth of the process's anonymous memory.
    `skipped_examples`: those without a labeled token within the length limit; `cut_examples`: those longer than it.
    `activations`: how they were compressed, if they were. `anchors`: what anchoring cost, if the model was anchored.
    `losses`: step and mean training loss since the previous entry. `held_out`: the scores on held-out rows, if there
    were any.
    """

    output: str
    train_loss: float
    steps: int
    trainable_parameters: int
    saved_activation_bytes: int
    peak_device_bytes: int
    seconds: float
    skipped_examples: int
    cut_examples: int = 0
    activations: ActivationReport | None = None
    anchors: AnchorReport | None = None
    losses: tuple[tuple[int, float], ...] = ()
    held_out: tuple[HeldOutScore, ...] = ()


@settings_keywords(TrainSettings, TrainKeywords)
def train_lora(
    emulator: str | Path,
    data: DataSource,
    output: str | Path,
    *,
    model: str | Path | None = None,
    eval_data: DataSource | None = None,
    **settings: Unpack[TrainKeywords],
) -> TrainResult:
    """Train a LoRA adapter on `emulator` and write it, with its provenance, to the directory `output`.

    `lora` and `args` hold further fields of PEFT's LoraConfig and TRL's SFTConfig, by their own names. The head of a
    sequence classifier is trained and saved whole, unless `lora` has an empty `modules_to_save`. `resume` continues an
    interrupted run from its newest checkpoint, and starts over if there is none. "all-linear" leaves out the head, and
    the experts and routers of mixtures, which are not linear modules. `activations` ("none", "layer", "sublayer") are
    compressed to factors of `activation_rank` plus two bits per value for their residual. The rank is a number, a share
    of the hidden size, or "auto", the smallest that keeps the first batch's gradient. `activation_report` measures that
    gradient. With `anchor_every`, the original `model` streams over the rows of the next so many steps, and each layer
    of the emulator is given what it lacks of the original's answer, in `anchor_bits` bits a value. `eval_data` are
    scored every `eval_steps` steps and after the last; they change nothing in the adapter. What a tool of `report_to`
    writes into files is moved into `output`, below `runs`. Raises `InputError` for unusable input.
    """
    started = time.perf_counter()
    sources = _Sources(emulator, data, eval_data, model)
    return _train_checked(TrainSettings.of(settings), sources, Path(output), started)


@dataclass(frozen=True)
class _Sources:
    """What a training reads, as the user named it."""

    emulator: str | Path
    data: DataSource
    eval_data: DataSource | None
    original: str | Path | None


def _train_checked(settings: TrainSettings, sources: _Sources, output: Path, started: float) -> TrainResult:
    """Find models and data, record the choices of the run, and train in the work directory next to `output`."""
    check_output(output, sources.emulator, sources.original)
    if find_spec("trl") is None or find_spec("datasets") is None:
        raise InputError(INSTALL)
    if settings.eval_steps is not None and sources.eval_data is None:
        raise InputError(f"--eval-steps {settings.eval_steps}: there is nothing to score; give --eval-data too")
    arguments = trainer_arguments(settings)
    from onelayer.compiler.adapters.attach import linear_targets

    directory = resolve_model(sources.emulator)
    model = read_model(directory, name=str(sources.emulator))
    anchor = anchor_source(settings, model, sources.original)
    fields = lora_fields(settings, model.ranks)
    linear_targets(model.empty(), fields.target_modules)  # a wrong name is found before anything is loaded
    examples = tokenized(sources.data, model, settings.max_length)
    held_out = None if sources.eval_data is None else tokenized(sources.eval_data, model, settings.max_length)
    record = {
        "format_version": 1,
        "kind": "adapter",
        "corrected": False,
        "trained_on": {"path": str(directory), "digest": model.digest},
        "base": model.base,
        "data": {**_places(sources.data), "digest": examples.digest, "examples": len(examples.rows)},
        **_choices(settings, fields, arguments),
    }
    run = _Run(settings, model, examples, held_out, fields, arguments, record, anchor)
    with work_directory(output, TRAINING_WORK, record, settings.resume) as work:
        return run.train(work, output, started)


def _places(data: DataSource) -> dict[str, Any]:
    """Name the data for the record: one source as `path`, several as `paths`, in the order in which they were read."""
    sources = data_sets(data)
    return {"path": str(sources[0])} if len(sources) == 1 else {"paths": [str(source) for source in sources]}


def _choices(settings: TrainSettings, fields: LoraFields, arguments: dict[str, Any]) -> dict[str, Any]:
    """List the choices that can change the adapter. A run can resume only if all of them are equal."""
    compressed = settings.activations != "none"
    anchored = settings.anchor_every is not None  # left out otherwise, so that older interrupted runs can go on
    return {
        "lora": fields.model_dump(mode="json"),
        "args": {name: value for name, value in arguments.items() if name not in NON_SEMANTIC_ARGS},
        "activations": {"where": settings.activations, "rank": settings.activation_rank} if compressed else None,
        **({"anchor": {"every": settings.anchor_every, "bits": settings.anchor_bits}} if anchored else {}),
    }


@dataclass(frozen=True)
class _Run:
    """A training with checked inputs, and what is recorded about it."""

    settings: TrainSettings
    model: TrainModel
    examples: TrainData
    held_out: TrainData | None
    fields: LoraFields
    arguments: dict[str, Any]
    record: dict[str, Any]
    anchor: Path | None

    def train(self, work: Path, output: Path, started: float) -> TrainResult:
        """Load, train from the newest checkpoint if there is one, publish."""
        from onelayer.compiler.machine.devices import pick_device
        from onelayer.runtime.training.adapter_directory import write_adapter_directory
        from onelayer.runtime.training.anchored import anchor
        from onelayer.runtime.training.callbacks import held_out_scores, logged_losses, mean_loss
        from onelayer.runtime.training.compressed_activations import TrainActivations
        from onelayer.runtime.training.trainers import make_trainer

        team, device = processes(), pick_device("cpu" if self.arguments.get("use_cpu") else None)
        with _global_random_state(), Meter(device) as meter:
            gpu = meter.on_gpu
            trainer = make_trainer(self.model, self.examples, self.held_out, self.fields, self.arguments, work, gpu)
            if self.settings.activations != "none":
                assert trainer.model is not None
                trainer.activations = TrainActivations(trainer.model, self.settings, work)
            anchoring = None if self.anchor is None else anchor(trainer, self.model, self.anchor, self.settings, meter)
            trainer.first_batch, checkpoint = read_first_batch(work), team.by_first(lambda: _checked_newest(work))
            if checkpoint is None or not trainer.take_up_finished(checkpoint):
                _train_until_stopped(trainer, work, checkpoint)
            peak_device_bytes = meter.sample()
        adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
        first_batch = trainer.first_batch
        assert first_batch is not None
        figures = {
            "train_loss": mean_loss(trainer.state.log_history),
            "losses": logged_losses(trainer.state.log_history),
            "steps": trainer.state.global_step,
            "trainable_parameters": adapted.get_nb_trainable_parameters()[0],
            "saved_activation_bytes": first_batch.saved_activation_bytes,
            "peak_device_bytes": peak_device_bytes,
            "seconds": round(time.perf_counter() - started, 3),
            "skipped_examples": self.examples.skipped,
            "cut_examples": self.examples.cut,
            "activations": first_batch.model_dump(mode="json")["activations"],
            "anchors": anchoring.report().model_dump(mode="json") if anchoring is not None else None,
            "held_out": [score.model_dump() for score in held_out_scores(trainer.state.log_history)],
        }
        # Parameters that are spread over processes are put together by all of them.
        state = None if team.is_alone else trainer.accelerator.get_state_dict(trainer.model)

        def publish() -> TrainResult:
            with atomic_directory(output) as partial:
                record = {**self.record, "training": figures}
                write_adapter_directory(partial, adapted, self.model, record, state)
                _take_logs(work, partial)
            return TrainResult.model_validate({"output": str(output), **figures})

        return team.by_first(publish)


def _checked_newest(work: Path) -> Path | None:
    """Return the checkpoint to continue from, or None. Raises `InputError` if its state is damaged."""
    checkpoint = newest_checkpoint(work)
    if checkpoint is not None:
        check_state(checkpoint)
    return checkpoint


def _train_until_stopped(trainer: "LoraTrainer | ClassTrainer", work: Path, checkpoint: Path | None) -> None:
    """Train to the end. Ctrl-C saves a checkpoint after the present step and raises `KeyboardInterrupt`."""
    from onelayer.runtime.training.callbacks import SaveAndStop

    with StopRequest("step") as stop:
        trainer.add_callback(SaveAndStop(stop))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step, last, saved = trainer.state.global_step, trainer.state.max_steps, newest_checkpoint(work)
        if step < last:
            notice(f"stopped after step {step} of {last}; {saved.name if saved else 'no checkpoint'} is saved")
            stop.check()


def _take_logs(work: Path, output: Path) -> None:
    """Copy what reporting tools wrote into the trainer's directory to the output, where the user looks for it."""
    for name in TOOL_FILES:
        if (source := work / name).is_dir():
            shutil.copytree(source, output / name)
        elif source.is_file():
            shutil.copy2(source, output / name)


@contextmanager
def _global_random_state() -> Iterator[None]:
    """Restore the states of the global generators, which Trainer seeds: a library call must not change them."""
    import random

    import numpy
    import torch

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
