"""Training of a denoiser with transformers' `Trainer`: rows of noise for encoded images, and the loss.

A batch is computed image by image, or some images at once where all have equal shapes. Calls of the denoiser are
accumulated steps, which gives the gradient of the whole batch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

from onelayer.compiler.adapters.attach import linear_targets
from onelayer.compiler.denoising.batches import (
    DenoisingBatch,
    DrawnImages,
    NoisyImages,
    go_together,
    joined_batches,
)
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.denoising.settings import ScoredNoise
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.sampling.report import Samples
from onelayer.compiler.sampling.sampler import PictureSampler
from onelayer.compiler.sources.data_set import DataSource, data_sets, names_of
from onelayer.compiler.storage.checkpoint import resolve_pipeline
from onelayer.compiler.storage.digests import sha256_json
from onelayer.runtime.anchors.anchors import ARGUMENTS
from onelayer.runtime.training.anchored import AnchoredTrainer
from onelayer.runtime.training.callbacks import MarkComplete
from onelayer.runtime.training.guarded import GuardedTrainer
from onelayer.runtime.training.inputs import TrainData, TrainModel
from onelayer.runtime.training.settings import LoraFields, TrainSettings

Row = dict[str, Any]
SAMPLES = "samples"


class DrawnRows(Dataset[Row]):
    """The rows of a whole training in order, `calls` of the denoiser for each step and process.

    Of neighboring rows each process is given one, in the order of their numbers. In each step the processes together
    take the images that one would take with batches as large as all of theirs.
    """

    def __init__(self, drawn: DrawnImages, plan: "DenoisingPlan") -> None:
        self.drawn, self.plan = drawn, plan

    def __len__(self) -> int:
        return self.plan.steps * self.plan.calls * self.plan.processes

    def __getitem__(self, number: int) -> Row:
        """Return a row: arguments, target and weights of the images of one call."""
        plan = self.plan
        turn, process = divmod(number, plan.processes)
        step, call = divmod(turn, plan.calls)
        begin = (step * plan.processes + process) * plan.batch_size
        first, end = (begin + min(place * plan.together, plan.batch_size) for place in (call, call + 1))
        [batch] = joined_batches([self.drawn.batch(image) for image in range(first, end)], plan.together)
        return row_of(batch)


class FixedRows(Dataset[Row]):
    """Held-out images at fixed times and noises."""

    def __init__(self, noisy: NoisyImages, samples: int) -> None:
        self.noisy, self.samples = noisy, samples

    def __len__(self) -> int:
        return len(self.noisy.images.rows) * self.samples

    def __getitem__(self, number: int) -> Row:
        """Return a row: arguments, target and weight."""
        row, place = divmod(number, self.samples)
        return row_of(self.noisy.held_out(row, self.samples)[place])


def row_of(batch: DenoisingBatch) -> Row:
    """Return a batch as Trainer moves it to the device."""
    return {ARGUMENTS: batch.inputs, "target": batch.target, "weights": batch.weights}


def _only(rows: list[Row]) -> Row:
    (row,) = rows
    return row


class _ScoredByNoise(Trainer):
    """A Trainer whose loss is the weighted mean squared error of what a denoiser predicts."""

    images: EncodedImages
    plan: "DenoisingPlan"

    def compute_loss(self, model: nn.Module, inputs: Row, *args: Any, **kwargs: Any) -> Any:
        """Compute the share of one call in the mean loss of a step, times the calls of a step."""
        return self._summed_loss(model, inputs) * (self.plan.calls / self.plan.batch_size)

    def _summed_loss(self, model: nn.Module, inputs: Row) -> torch.Tensor:
        batch = DenoisingBatch({}, inputs["target"], inputs["weights"], self.images.answer, 0, ())
        return batch.loss(model(**inputs[ARGUMENTS]))

    def prediction_step(self, model: nn.Module, inputs: Row, *args: Any, **kwargs: Any) -> Any:
        """Score one held-out image."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._summed_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # rows are in a drawn order already


class DenoisingTrainer(AnchoredTrainer, GuardedTrainer, _ScoredByNoise):
    """The trainer for denoisers."""


@dataclass(frozen=True)
class DenoisingPlan:
    """How many steps a training takes, how many images each process takes in one, and how many of these go together."""

    steps: int
    batch_size: int
    together: int = 1
    processes: int = 1

    @classmethod
    def of(cls, arguments: Mapping[str, Any], images: int, together: int) -> "DenoisingPlan":
        """Read the arguments of a Trainer. `images` counts those of the subject, once in an epoch."""
        batch_size = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        count = processes().count
        if (steps := arguments.get("max_steps", -1)) <= 0:
            steps = max(1, math.ceil(arguments.get("num_train_epochs", 3.0) * images / (batch_size * count)))
        return cls(steps, batch_size, together, count)

    @property
    def calls(self) -> int:
        """The calls of the denoiser in a step, in each process."""
        return math.ceil(self.batch_size / self.together)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for batches of one call."""
        own = {"gradient_accumulation_steps": self.calls}
        own |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1)
        without = ("max_length", "num_train_epochs")
        more = {"max_steps": self.steps, "remove_unused_columns": False, "dataloader_pin_memory": False}
        return {**{name: value for name, value in given.items() if name not in without}, **own, **more}


def noisy_images(data: DataSource, model: TrainModel, settings: TrainSettings) -> TrainData:
    """Open the encoded images of a denoiser. Raises `InputError` for settings that are for text alone."""
    for option, given in (("--method", settings.method != "sft"), ("--packing", (settings.args or {}).get("packing"))):
        if given:
            raise InputError(f"{option}: is for models of text, not for {model.directory}; leave it out")
    images = EncodedImages.open(data_sets(data)[0].path)
    if len(data_sets(data)) > 1:
        raise InputError(f"{names_of(data)}: a denoiser reads one directory; encode all folders of images together")
    images.check_denoiser(model.base["digest"], str(model.base["model"]))
    assert model.dtype is not None
    noisy = NoisyImages(images, model.dtype, settings.seed, **settings.noise)
    together = settings.micro_batch_size or 1
    if together > 1:
        first, *others = (noisy.at(row, 0.5, 1) for row in range(len(images.rows)))
        if not all(go_together(first, other) for other in others):
            raise InputError(
                f"--micro-batch-size {together}: {names_of(data)}: its pictures or prompts have different shapes, so "
                "each is computed alone; leave it out"
            )
    return TrainData([asdict(row) for row in images.rows], images.digest, 0, 0, images=noisy, together=together)


def denoising_trainer(
    loaded: Any, rows: TrainData, held_out: TrainData | None, fields: LoraFields, arguments: dict[str, Any]
) -> DenoisingTrainer:
    """Make the trainer of a loaded denoiser, with a fresh adapter on it. Held-out images are scored at fixed times."""
    images = rows.images
    assert images is not None
    plan = DenoisingPlan.of(arguments, len(images.images.numbers(is_class=False)), rows.together)
    config = TrainingArguments(**plan.arguments(arguments))
    scored = None if held_out is None else held_out.images
    loaded.requires_grad_(False)
    set_seed(config.seed)
    targets = linear_targets(loaded, fields.target_modules)
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(**{**fields.model_dump(), "target_modules": targets}))
    trainer = DenoisingTrainer(
        model=adapted,
        args=config,
        train_dataset=DrawnRows(DrawnImages(images, plan.batch_size), plan),
        eval_dataset=None if scored is None else FixedRows(scored, ScoredNoise.default("noise_samples")),
        data_collator=_only,
        callbacks=[MarkComplete()],
    )
    trainer.images, trainer.plan = images.images, plan
    trainer.model_accepts_loss_kwargs = False  # the mean over accumulated images is ours to ask for
    return trainer


def opened_sampler(settings: TrainSettings, rows: TrainData) -> PictureSampler:
    """Open the pipeline that the images were encoded for; it draws sample pictures.

    Raises `InputError` if it cannot draw them, or its denoiser is another one now.
    """
    pictures = settings.pictures
    assert pictures is not None
    assert rows.images is not None
    base = rows.images.images.base
    try:
        sampler = PictureSampler(resolve_pipeline(base["model"], base["revision"]), pictures, settings.seed)
        rows.images.images.check_denoiser(sampler.digest, str(sampler.pipeline.denoiser_directory))
    except InputError as error:
        raise InputError(f"--sample-prompt: {error}") from error
    return sampler


def drawn_samples(sampler: PictureSampler, adapter: Path, work: Path, device: torch.device) -> Samples:
    """Draw pictures with an adapter into the folder `samples` in it; answers of components wait in `work`."""
    kept = work / f"{SAMPLES}-{sha256_json(sampler.recorded())[:16]}"
    return sampler.draw(adapter, kept, adapter / SAMPLES, device)
