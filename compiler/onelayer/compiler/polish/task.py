"""The inputs of a polish: the original, the first adapter, the data, and what identifies them for a resume."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from onelayer.compiler.adapters.attach import Adapted
from onelayer.compiler.adapters.fit import check_made_for
from onelayer.compiler.adapters.reader import Adapter, adapter_digest, adapter_stamps
from onelayer.compiler.adapters.writer import Base
from onelayer.compiler.data.batches import make_batches, tokens_digest
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.labeled_rows import DataSource, read_for
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.data.train_rows import TrainRows
from onelayer.compiler.denoising.batches import DrawnImages, NoisyImages, joined_batches
from onelayer.compiler.denoising.encoded import encoded_images
from onelayer.compiler.denoising.settings import ScoredNoise, TrainedNoise
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.library import library_of
from onelayer.compiler.libraries.transformers_models import model_class, read_config
from onelayer.compiler.models.original import Original
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.polish.resume import PolishState
from onelayer.compiler.polish.settings import PolishSettings
from onelayer.compiler.polish.trained_adapter import FreshAdapter, attach_trainable, write_polished
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.files import atomic_directory
from onelayer.compiler.storage.stamps import FileStamps
from onelayer.compiler.streaming.denoising_loss import PassBatch


@dataclass(frozen=True)
class PolishTask:
    """The checked inputs of one polish. `start` is an adapter's directory, or the settings of a fresh one.

    `stamps` are the files' stamps from before they were digested.
    """

    directory: Path
    base: dict[str, Any]
    start: Path | FreshAdapter
    rows: TrainRows | DrawnImages
    held_out: Sequence[Tokens] | NoisyImages
    settings: PolishSettings
    device: torch.device
    stamps: Sequence[FileStamps]

    @classmethod
    def read(
        cls,
        model: str | Path,
        start: str | Path | FreshAdapter,
        data: DataSource,
        eval_data: DataSource | None,
        settings: PolishSettings,
        device: torch.device,
    ) -> "PolishTask":
        """Find and tokenize everything. Raises `InputError` for what the caller can fix."""
        directory = resolve_model(model, settings.revision)
        start = start if isinstance(start, FreshAdapter) else resolve_model(start)
        stamps = [Checkpoint.open(directory).stamps]
        stamps += [] if isinstance(start, FreshAdapter) else [adapter_stamps(start)]
        name = str(Path(model).absolute()) if Path(model).exists() else str(model)
        base = {"model": name, "revision": settings.revision, "digest": model_digest(directory)}
        if library_of(directory).DENOISES:
            images, scored = _noisy_images(directory, data, eval_data, settings)
            return cls(directory, base, start, images, scored, settings, device, stamps)
        config = read_config(directory)
        found_class = model_class(config, directory)
        tokenizer = load_reader(directory, found_class, settings.max_image_pixels)
        classes = predicted_classes(found_class, config, directory)
        if classes is not None and settings.packing:
            raise InputError("--packing: a classifier predicts one class of a row, so rows stay apart; leave it out")
        length = settings.max_length
        rows = TrainRows.read(data, tokenizer, length, settings.batch_size, settings.seed, classes)
        if settings.packing and any(row.inputs is not None for row in rows.rows):
            raise InputError("--packing: rows for a model that reads images or audio stay apart; leave it out")
        held_out = [] if eval_data is None else read_for(classes, eval_data, tokenizer, length)
        return cls(directory, base, start, rows, held_out, settings, device, stamps)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that can change the adapter; a run resumes only if all of it is the same."""
        held_out = self.held_out
        scored = held_out.images.digest if isinstance(held_out, NoisyImages) else tokens_digest(held_out)
        libraries = {"torch": torch, "transformers": transformers, "peft": peft}
        return {
            "base": self.base,
            "adapter": str(self.start) if isinstance(self.start, FreshAdapter) else adapter_digest(self.start),
            "data": {"train": self.rows.digest, "held_out": scored},
            "settings": {**self._recorded(), "device": self.device.type},
            "versions": {
                "python": platform.python_version(),
                **{name: library.__version__ for name, library in libraries.items()},
            },
        }

    def _recorded(self) -> dict[str, Any]:
        limit, noise = self.settings.max_gradient_norm, TrainedNoise.model_fields
        of_text = () if isinstance(self.rows, DrawnImages) else noise  # older records of text stay valid
        return {
            **self.settings.recorded("lora_rank", "lora_alpha", "target_modules", *of_text),
            "activations": self.settings.activation_rank,
            "max_gradient_norm": limit if math.isfinite(limit) else None,  # JSON has no infinity
        }

    def make_start(self, work: Path) -> None:
        """Make a fresh adapter in the work directory, once."""
        path = work / "start"
        if isinstance(self.start, FreshAdapter) and not path.exists():
            with atomic_directory(path) as partial:
                self.start.write(partial, self.directory)

    def open(self, work: Path) -> tuple[Adapter, Adapted, PolishState]:
        """Return the first adapter, the empty original with it attached, and the state before the first step.

        A fresh adapter was made in the work directory. Raises `InputError` if the two do not belong together.
        """
        path = self.start if isinstance(self.start, Path) else work / "start"
        adapter = Adapter.open(path)
        self._check(adapter)
        adapted, trained = attach_trainable(self.directory, adapter, self.device)
        optimizer = torch.optim.AdamW(list(trained.values()), lr=self.settings.learning_rate, weight_decay=0.0)
        return adapter, adapted, PolishState(trained, optimizer)

    def _check(self, adapter: Adapter) -> None:
        check_made_for(adapter, self.directory, self.base["digest"])
        if not adapter.modules:
            raise InputError(f"{adapter.directory}: adapts no module, there is nothing to train; give a LoRA adapter")

    def held_out_batches(self, config: Any) -> Sequence[PassBatch]:
        """Return the held-out data as the model is called with it."""
        if isinstance(self.held_out, NoisyImages):
            count, rows = ScoredNoise.default("noise_samples"), range(len(self.held_out.images.rows))
            batches = [batch for row in rows for batch in self.held_out.held_out(row, count)]
            return joined_batches(batches, self.settings.micro_batch_size)
        if not self.held_out:
            return []
        return make_batches(self.held_out, config, self.settings.micro_batch_size)

    def save(self, state: PolishState, work: Path) -> None:
        """Keep the state after a step. Raises `InputError` if what the step read has changed."""
        self._check_unchanged()
        state.save(work)

    def _check_unchanged(self) -> None:
        for stamps in self.stamps:
            stamps.check()

    def publish(
        self, output: Path, adapter: Adapter, streamed: StreamedModel, state: PolishState, failure: str | None
    ) -> None:
        """Write the adapter, with its provenance and history, in one step."""
        kind = type(streamed.model)
        base = Base(
            self.base["model"],
            self.base["revision"],
            kind.__name__,
            kind.__module__,
            adapter.config.fan_in_fan_out,
            streamed.checkpoint.quantization,
        )
        identity = self.identity
        record = {name: identity[name] for name in ("base", "data", "settings")} | state.history
        with atomic_directory(output) as partial:
            write_polished(partial, adapter, streamed.model, state.chosen(), base, {**record, "stopped": failure})
            self._check_unchanged()


def _noisy_images(
    directory: Path, data: DataSource, eval_data: DataSource | None, settings: PolishSettings
) -> tuple[DrawnImages, Sequence[Tokens] | NoisyImages]:
    """Open the encoded images of a denoiser, to train on and held out. Raises `InputError` for settings of text."""
    if settings.packing:
        raise InputError("--packing: is for models of text; leave it out")
    dtype = Original.open(directory).dtype
    noise = {name: getattr(settings, name) for name in TrainedNoise.model_fields}
    noisy = NoisyImages(encoded_images(data, directory), dtype, settings.seed, **noise)
    held_out: Sequence[Tokens] | NoisyImages = []
    if eval_data is not None:
        held_out = NoisyImages(encoded_images(eval_data, directory), dtype)
    return DrawnImages(noisy, settings.batch_size), held_out
