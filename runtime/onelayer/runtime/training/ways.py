"""How a model is held while it is trained: whole, or on disk and streamed in every step.

In: facts about the model, the settings, the tokens of a batch. Out: the same facts, with how it is opened.
"""

import math
import time
from dataclasses import replace
from typing import Any

import psutil
import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.models.unit_memory import resident_bytes
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.runtime.sizes import size
from onelayer.runtime.streamed.engine import StreamingEngine
from onelayer.runtime.streamed.settings import StreamedSettings
from onelayer.runtime.training.callbacks import Progress
from onelayer.runtime.training.inputs import TrainData, TrainModel
from onelayer.runtime.training.settings import TrainSettings


def longest_batch(examples: TrainData, arguments: dict[str, Any]) -> int:
    """Count the tokens of the largest batch of a training; a row of preferences has those of all its answers."""
    longest = max(sum(len(ids) for name, ids in row.items() if name.endswith("_ids")) for row in examples.rows)
    longest = arguments["max_length"] if arguments.get("packing") else longest
    return int(longest * arguments["per_device_train_batch_size"])


def held_by(model: TrainModel, settings: TrainSettings, tokens: int, device: torch.device) -> TrainModel:
    """Return the model with the way that it is held, and print it for an original. `tokens` are those of a batch.

    Raises `InputError` if the settings do not go with the way.
    """
    if model.ranks:
        if settings.way == "streamed":
            raise InputError(f"--way streamed: {model.directory} is an emulator, which is made to fit; leave it out")
        return model
    checkpoint = Checkpoint.open(model.directory)
    needed, free = _resident_bytes(checkpoint, model, tokens, device), _free_bytes(device)
    streams = settings.way == "streamed" or (settings.way == "auto" and needed > free)
    text = f"{size(needed)} for weights and activations of {tokens} tokens, {size(free)} are free"
    if not streams:
        notice(f"trained in memory: {text}")
        return model
    _check(settings)
    asked = StreamedSettings(
        device=str(device), micro_batch_size=settings.micro_batch_size, cache_bytes=settings.cache_bytes
    )
    weights = sum(info.size_bytes for info in checkpoint.tensors.values())
    read = max(0, 2 * (weights - settings.cache_bytes))
    speed = _read_speed(checkpoint)
    notice(
        f"trained on disk: {text}; each batch reads {size(read)}, at {size(int(speed))}/s at least {read / speed:.1f} s"
    )
    return replace(model, streaming=asked)


def show_streams(adapted: Any, bar: Progress) -> None:
    """Show the streams of an adapted model, if it is streamed, in the bar of its training."""
    if (engine := _engine(adapted)) is not None:
        bar.streams, engine.bar = "streaming", bar


def streaming_figures(adapted: Any) -> dict[str, Any] | None:
    """Return what streaming an adapted model cost; None if it was in memory."""
    engine = _engine(adapted)
    return None if engine is None else engine.report().model_dump(mode="json")


def _engine(adapted: Any) -> StreamingEngine | None:
    return getattr(adapted.get_base_model(), "streaming", None)


def _check(settings: TrainSettings) -> None:
    if settings.activations != "none":
        raise InputError(f"--activations {settings.activations}: a streamed model keeps inputs of layers; leave it out")
    if not processes().is_alone:
        raise InputError("--way streamed: runs in one process; start it without torchrun")
    if settings.gradient_accumulation > 1:
        notice(f"--gradient-accumulation {settings.gradient_accumulation}: every batch of a step reads the model")


def _resident_bytes(checkpoint: Checkpoint, model: TrainModel, tokens: int, device: torch.device) -> int:
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    shapes = [info.shape for info in checkpoint.tensors.values()]
    width = sum(sum(shape[-2:]) for shape in shapes if len(shape) >= 2)
    weights = dtype.itemsize * sum(math.prod(shape) for shape in shapes)
    return resident_bytes(weights, width, dtype.itemsize, tokens, device.type != "cpu")


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _read_speed(checkpoint: Checkpoint) -> float:
    """Measure bytes per second over the largest tensor."""
    name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].size_bytes)
    started = time.perf_counter()
    checkpoint.read(name)
    return checkpoint.tensors[name].size_bytes / max(time.perf_counter() - started, 1e-9)
