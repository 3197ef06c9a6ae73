"""How a model is held while it is trained: whole, or on disk and streamed in every batch.

In: a model's directory, the settings, the tokens of a batch. Out: how it is streamed, if it is; a notice that says so.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.devices import free_bytes
from onelayer.compiler.models.unit_memory import resident_bytes
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.runtime.sizes import size
from onelayer.runtime.streamed.engine import StreamingEngine
from onelayer.runtime.streamed.settings import Holding, StreamedSettings


def chosen_way(
    directory: Path,
    dtype: torch.dtype,
    settings: Holding,
    tokens: int,
    device: torch.device,
    quantization: str | None = None,
) -> StreamedSettings | None:
    """Return how a model of `dtype` is streamed; None if it is held whole. Print which, with its cost.

    `tokens` are those of the largest batch. Weights quantized by the method `quantization` are unpacked as they are
    read, so such a model always streams; `InputError` is raised if it shall be held.
    """
    checkpoint = Checkpoint.open(directory)
    if quantization is not None:
        if settings.way == "resident":
            raise InputError(
                f"--way resident: {directory} has {quantization} weights, which are unpacked as they stream; use "
                "--way streamed --cache SIZE to keep layers in memory"
            )
        streams, text = True, f"{quantization} weights are unpacked layer by layer"
    else:
        needed, free = _resident_bytes(checkpoint, dtype, tokens, device), free_bytes(device)
        streams = settings.way == "streamed" or (settings.way == "auto" and needed > free)
        text = f"{size(needed)} for weights and activations of {tokens} tokens, {size(free)} are free"
    if not streams:
        notice(f"trained in memory: {text}")
        return None
    weights = sum(info.size_bytes for info in checkpoint.tensors.values())
    read, speed = max(0, 2 * (weights - settings.cache_bytes)), _read_speed(checkpoint)
    rate = f"at {size(int(speed))}/s at least {read / speed:.1f} s"
    notice(f"trained on disk: {text}; each batch reads {size(read)}, {rate}")
    return StreamedSettings(
        device=str(device), micro_batch_size=settings.micro_batch_size, cache_bytes=settings.cache_bytes
    )


def show_streams(adapted: Any, bar: Any) -> None:
    """Show the streams of an adapted model, if it is streamed, in the bar of its training."""
    if (engine := _engine(adapted)) is not None:
        bar.streams, engine.bar = "streaming", bar


def streaming_figures(adapted: Any) -> dict[str, Any] | None:
    """Return what streaming an adapted model cost; None if it was in memory."""
    engine = _engine(adapted)
    return None if engine is None else engine.report().model_dump(mode="json")


def _engine(adapted: Any) -> StreamingEngine | None:
    return getattr(adapted.get_base_model(), "streaming", None)


def _resident_bytes(checkpoint: Checkpoint, dtype: torch.dtype, tokens: int, device: torch.device) -> int:
    shapes = [info.shape for info in checkpoint.tensors.values()]
    width = sum(sum(shape[-2:]) for shape in shapes if len(shape) >= 2)
    weights = dtype.itemsize * sum(math.prod(shape) for shape in shapes)
    return resident_bytes(weights, width * tokens, dtype.itemsize, device.type != "cpu")


def _read_speed(checkpoint: Checkpoint) -> float:
    """Measure bytes per second over the largest tensor."""
    name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].size_bytes)
    started = time.perf_counter()
    checkpoint.read(name)
    return checkpoint.tensors[name].size_bytes / max(time.perf_counter() - started, 1e-9)
