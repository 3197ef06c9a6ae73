"""Trains a LoRA adapter on a directory that fits in memory: an emulator, or any plain model.

LoRA is PEFT's. The loop is TRL's, and for sequence classifiers transformers'. Every check runs before weights are read.
The work directory next to the output holds the checkpoints. The adapter appears in one rename, when it is complete.
"""

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.reference import Reference
from onelayer.compiler.machine.console import StopRequest
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.results import Report, Result
from onelayer.compiler.sampling.report import Samples
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.sources.data_set import places
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.compiler.storage.files import atomic_directory, check_output
from onelayer.compiler.storage.work_directory import work_directory
from onelayer.runtime.activations.report import ActivationReport
from onelayer.runtime.anchors.report import AnchorReport
from onelayer.runtime.preferences.reference import given_reference, referenced_rows
from onelayer.runtime.training.checkpoints import (
    TRAINING_WORK,
    HeldOutScore,
    checked_newest,
    read_first_batch,
    shared_steps,
)
from onelayer.runtime.training.inputs import (
    TrainData,
    TrainModel,
    held_by,
    longest_batch,
    original_source,
    preference_data,
    read_model,
    tokenized,
    with_default_anchors,
)
from onelayer.runtime.training.settings import (
    INSTALL,
    LoraFields,
    TrainKeywords,
    TrainSettings,
    lora_fields,
    trainer_arguments,
)
from onelayer.runtime.training.trainer_args import NON_SEMANTIC_ARGS, training_device

if TYPE_CHECKING:
    from onelayer.compiler.sampling.sampler import PictureSampler


class TrainResult(Result):
    """The result of `train_lora`.

    `saved_activation_bytes`: what autograd keeps for one batch's backward pass, without parameters.
    `peak_device_bytes`: on a GPU the peak of its allocator, on a CPU the growth of the process's anonymous memory.
    `skipped_examples`: those without a labeled token within the length limit; `cut_examples`: those longer than it.
    `activations`: how they were compressed, if they were. `anchors`: what anchoring cost, if the model was anchored.
    `losses`: step and mean training loss since the previous entry. `streamed`: what reading the model in every step
    cost, if it was streamed. `held_out`: the scores on held-out rows, if there were any. `reference`: what the pass
    over the original cost that scored the answers of preferences. `samples`: the pictures that were drawn at the end.
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
    streamed: Report | None = None
    held_out: tuple[HeldOutScore, ...] = ()
    reference: Report | None = None
    samples: Samples | None = None


@settings_keywords(TrainSettings, TrainKeywords)
def train_lora(
    emulator: str | Path,
    data: DataSource,
    output: str | Path,
    *,
    model: str | Path | None = None,
    eval_data: DataSource | None = None,
    reference: str | Path | None = None,
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
    writes into files is moved into `output`, below `runs`. The methods "dpo" and "kto" learn preferences; on an
    emulator their reference is the original: `model` streams over all answers once, or `reference` is a directory that
    `reference_scores` wrote. An original that does not fit the memory is streamed, layer by layer, in every step
    (`way`). With `sample_prompt`, pictures of the streamed pipeline with the adapter are written to `samples` in
    `output`. Raises `InputError` for unusable input.
    """
    started = time.perf_counter()
    sources = _Sources(emulator, data, eval_data, model, reference)
    return _train_checked(TrainSettings.of(settings), sources, Path(output), started)


@dataclass(frozen=True)
class _Sources:
    """What a training reads, as the user named it."""

    emulator: str | Path
    data: DataSource
    eval_data: DataSource | None
    original: str | Path | None
    reference: str | Path | None

    def rows(self, model: TrainModel, settings: TrainSettings, batch_size: int) -> tuple[TrainData, TrainData | None]:
        """Tokenize the data, and the held-out data if there are any."""

        def read(data: DataSource) -> TrainData:
            if model.denoises:
                from onelayer.runtime.training.denoising import noisy_images

                return noisy_images(data, model, settings)
            if settings.method == "sft":
                return tokenized(data, model, settings.max_length)
            return preference_data(data, model, settings, batch_size)

        return read(self.data), None if self.eval_data is None else read(self.eval_data)


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
    model = read_model(directory, str(sources.emulator), settings.max_image_pixels)
    if settings.sample_prompt is not None and not model.denoises:
        raise InputError(f"--sample-prompt: {sources.emulator} draws no pictures; leave it out")
    reference = given_reference(Path(sources.reference), model.base["digest"]) if sources.reference else None
    settings = with_default_anchors(settings, model, sources.original)
    original = original_source(settings, model, sources.original, reference is not None)
    fields = lora_fields(settings, model.ranks)
    linear_targets(model.empty(), fields.target_modules)  # a wrong name is found before anything is loaded
    examples, held_out = sources.rows(model, settings, arguments["per_device_train_batch_size"])
    sampler = None
    if settings.sample_prompt is not None:
        from onelayer.runtime.training.denoising import opened_sampler

        sampler = opened_sampler(settings, examples)
    model = held_by(model, settings, longest_batch(examples, arguments), training_device(arguments))
    record = {
        "format_version": 1,
        "kind": "adapter",
        "corrected": False,
        "trained_on": {"path": str(directory), "digest": model.digest},
        "base": model.base,
        "data": {**places(sources.data), "digest": examples.digest, "examples": len(examples.rows)},
        **_choices(settings, fields, arguments, model.denoises),
    }
    run = _Run(settings, model, examples, held_out, fields, arguments, record, original, reference, sampler)
    with work_directory(output, TRAINING_WORK, record, settings.resume) as work:
        run = replace(run, arguments=shared_steps(work, arguments, settings.method))
        referenced, report = run.with_reference(work)
        return referenced.train(work, output, started, report)


def _choices(settings: TrainSettings, fields: LoraFields, arguments: dict[str, Any], denoises: bool) -> dict[str, Any]:
    """List the choices that can change the adapter. A run can resume only if all of them are equal."""
    compressed = settings.activations != "none"
    anchored = settings.anchor_every is not None  # left out otherwise, so that older interrupted runs can go on
    return {
        "lora": fields.model_dump(mode="json"),
        "args": {name: value for name, value in arguments.items() if name not in NON_SEMANTIC_ARGS},
        "activations": {"where": settings.activations, "rank": settings.activation_rank} if compressed else None,
        **({"anchor": {"every": settings.anchor_every, "bits": settings.anchor_bits}} if anchored else {}),
        **({} if settings.method == "sft" else {"method": settings.method}),
        **(settings.noise if denoises else {}),
        **({"micro_batch_size": settings.micro_batch_size} if denoises and settings.micro_batch_size else {}),
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
    original: Path | None
    reference: Reference | None
    sampler: "PictureSampler | None"

    def with_reference(self, work: Path) -> tuple["_Run", Report | None]:
        """Return the run with log-probabilities of the original in its rows, if it learns preferences and needs them.

        An emulator does, and a streamed original: it would be read once more in every step. The report says what it
        cost to find them, if this was not done before.
        """
        method = self.settings.method
        if method == "sft":
            return self, None
        sets = [self.examples, *([] if self.held_out is None else [self.held_out])]
        original = self.original if self.model.streaming is None else self.model.directory
        device = "cpu" if self.arguments.get("use_cpu") else None
        rows, report = referenced_rows([data.rows for data in sets], method, self.reference, original, work, device)
        examples, *held_out = [replace(data, rows=own) for data, own in zip(sets, rows, strict=True)]
        return replace(self, examples=examples, held_out=held_out[0] if held_out else None), report

    def train(self, work: Path, output: Path, started: float, reference: Report | None) -> TrainResult:
        """Load, train from the newest checkpoint if there is one, publish."""
        from onelayer.runtime.streamed.ways import show_streams, streaming_figures
        from onelayer.runtime.training.anchored import anchor, train_until_stopped
        from onelayer.runtime.training.callbacks import held_out_scores, logged_losses, mean_loss
        from onelayer.runtime.training.guarded import TrainActivations, global_random_state
        from onelayer.runtime.training.trainers import make_trainer

        team, rows = processes(), (self.examples, self.held_out)
        with global_random_state(), Meter(training_device(self.arguments)) as meter:
            gpu = meter.on_gpu
            trainer = make_trainer(self.settings.method, self.model, rows, self.fields, self.arguments, work, gpu)
            if self.settings.activations != "none":
                assert trainer.model is not None
                trainer.activations = TrainActivations(trainer.model, self.settings, work)
            show_streams(trainer.accelerator.unwrap_model(trainer.model), trainer.bar)
            trainer.first_batch, checkpoint = read_first_batch(work), team.by_first(lambda: checked_newest(work))
            anchoring = None
            with StopRequest("step") as stop:
                if self.settings.anchor_every is not None:
                    assert self.original is not None
                    anchoring = anchor(trainer, self.model, self.original, self.settings, meter, stop)
                if checkpoint is None or not trainer.take_up_finished(checkpoint):
                    train_until_stopped(trainer, work, checkpoint, stop)
            peak_device_bytes = meter.sample()
        adapted, first_batch = trainer.accelerator.unwrap_model(trainer.model), trainer.first_batch
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
            "streamed": streaming_figures(adapted),
            "reference": None if reference is None else reference.model_dump(mode="json"),
            "held_out": [score.model_dump() for score in held_out_scores(trainer.state.log_history)],
        }
        # Parameters that are spread over processes are put together by all of them.
        state = None if team.is_alone else trainer.accelerator.get_state_dict(trainer.model)

        return team.by_first(lambda: self._published(output, work, adapted, state, figures))

    def _published(
        self, output: Path, work: Path, adapted: Any, state: dict[str, Any] | None, figures: dict[str, Any]
    ) -> TrainResult:
        """Write the adapter and its pictures; `state` are its values where no process has them all."""
        from onelayer.runtime.training.adapter_directory import copy_logs, write_adapter_directory
        from onelayer.runtime.training.denoising import SAMPLES, drawn_samples

        samples = None
        with atomic_directory(output) as partial:
            write_adapter_directory(partial, adapted, self.model, {**self.record, "training": figures}, state)
            copy_logs(work, partial)
            if self.sampler is not None:
                adapted.to("cpu")  # the streams need its place
                drawn = drawn_samples(self.sampler, partial, work, training_device(self.arguments))
                samples = drawn.model_copy(update={"output": str(output / SAMPLES)})
        return TrainResult.model_validate({"output": str(output), **figures, "samples": samples})
