"""What streams a model for its callers: units, loader, memory, and one region for each call of a part of the model.

In: calls of the model and of its parts, by any code. Out: their results, and gradients through them. Held on the
device: one unit, its micro-batch, adapters. Held on the host: what is read ahead, cached units, and the inputs of units
that wait for the way back; beyond a budget these lie in mapped files.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import Shown
from onelayer.compiler.machine.devices import free_bytes, move, pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.linears import head_workspace, widest
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import (
    ADAPTER_COPIES,
    graph_bytes,
    states_bytes,
    step_bytes,
)
from onelayer.compiler.models.units import Unit, hidden_forwards
from onelayer.compiler.results import Report
from onelayer.compiler.streaming import token_loss  # noqa: F401  # the loss of deferred logits, by slices
from onelayer.compiler.streaming.gradient_stream import HOST, GradientStream
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream
from onelayer.compiler.streaming.unit_loader import UnitLoader
from onelayer.runtime.streamed.region import Region
from onelayer.runtime.streamed.rows import join_rows, rows_of, split_rows, tokens_per_row
from onelayer.runtime.streamed.settings import StreamedSettings

# The share of the free memory that one micro-batch may take.
MICRO_BATCH_SHARE = 0.5


class Silent:
    """Shows nothing: the bar is the trainer's."""

    def reached(self, count: int, unit: str, peak_bytes: int, note: str = "") -> None:
        """Do nothing."""


class StreamingEngine:
    """Streams one model. `is_running` while a stream is under way, so that calls inside it are the model's own."""

    def __init__(self, directory: Path, settings: StreamedSettings) -> None:
        self.settings = settings
        self.device = pick_device(settings.device)
        self.streamed = StreamedModel(directory)
        self.bar: Shown = Silent()
        self.is_running = False
        self.step_tokens = self.batch_tokens = 0  # tokens of the largest micro-batch and batch so far
        self.kept_bytes = 0  # most that the host held of kept unit inputs
        self._spill_pool = SpillPool(settings.host_memory_bytes)
        self._meter = Meter(self.device).__enter__()
        weakref.finalize(self, self._meter.__exit__, None, None, None)
        self._opened = ExitStack()
        self._modules: list[nn.Module] = []
        self._outside: list[Unit] = []
        self._loader: UnitLoader | None = None
        self._arrange()

    @property
    def model(self) -> Any:
        """The model that is streamed."""
        return self.streamed.model

    def whole(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the forward of the whole model: its parts stream, what is around them runs on all rows at once."""
        if self.is_running:
            return forward(*args, **kwargs)
        self._arrange()
        alone = {unit.module: partial(self._alone, unit) for unit in self._outside}
        with hidden_forwards(alone):
            return forward(*args, **kwargs)

    def part(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the forward of a part of the model as a stream of its own, in micro-batches of rows."""
        if self.is_running:
            return forward(*args, **kwargs)
        self._arrange()
        arguments = (args, kwargs)
        rows = rows_of(arguments)
        return self._streamed(module, forward, arguments, rows, self._rows_at_once(arguments, rows))

    def _alone(self, unit: Unit, *args: Any, **kwargs: Any) -> Any:
        """Run one unit that is called outside of every part, such as the head of a classifier, on all rows at once."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return unit.module.forward(*args, **kwargs)  # the stub of the stream that runs now

        return self._streamed(unit.module, forward, (args, kwargs), None, None)

    def _streamed(
        self, module: nn.Module, forward: Callable[..., Any], arguments: Any, rows: int | None, size: int | None
    ) -> Any:
        name, call = type(module).__name__, lambda arguments: forward(*arguments[0], **arguments[1])
        shared: dict[str, Any] = {"spill_pool": self._spill_pool, "call": call}
        trains = any(parameter.requires_grad for parameter in module.parameters())
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and (trains or any(tensor.requires_grad for tensor in tensors)):
            stream = GradientStream(self.streamed, self.device, self._meter, **shared)
            stream.loader, stream.bar, stream.dropout = self._loader, self.bar, self.model.training
            result = Region(stream, self._running, arguments, size, rows).run(name)
            self.kept_bytes = max(self.kept_bytes, self._spill_pool.held_bytes)
            return result
        if torch.is_grad_enabled() and self.model.training and not self._trains():
            raise InputError(f"{self.model.name_or_path}: nothing is trained; attach an adapter (peft.get_peft_model)")
        pieces = [move(arguments, HOST)]
        pieces = pieces if rows is None or size is None else split_rows(pieces[0], rows, size)
        outputs: dict[int, Any] = {}
        plain = _Plain(self.streamed, self.device, self._meter, **shared)
        plain.loader, plain.bar = self._loader, self.bar
        with self._running():
            plain.run([{"arguments": piece} for piece in pieces], outputs.__setitem__)
        counts = [1] if rows is None or size is None else [min(size, rows - at) for at in range(0, rows, size)]
        return move(join_rows([outputs[index] for index in range(len(pieces))], counts, name), self.device)

    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    @contextmanager
    def _running(self) -> Iterator[None]:
        before, self.is_running = self.is_running, True
        try:
            yield
        finally:
            self.is_running = before

    def _rows_at_once(self, arguments: Any, rows: int | None) -> int | None:
        """Return how many rows a micro-batch has, at most those of the batch; None if it cannot be split."""
        tokens = tokens_per_row(arguments)
        self.batch_tokens = max(self.batch_tokens, tokens * (rows or 1))
        if rows is None:
            self.step_tokens = max(self.step_tokens, tokens)
            return None
        size = self.settings.micro_batch_size
        if size is None:
            per_row = graph_bytes(self._width * tokens, self.streamed.dtype.itemsize, self._meter.on_gpu)
            size = max(1, int(MICRO_BATCH_SHARE * self._free_bytes()) // per_row)
        size = min(size, rows)
        self.step_tokens = max(self.step_tokens, tokens * size)
        return size

    def _free_bytes(self) -> int:
        """Return the free memory of the device, without what the unit that is read ahead will take."""
        if self._meter.on_gpu:
            return max(0, free_bytes(self.device) - 2 * self.streamed.largest_unit_bytes)
        return max(0, psutil.virtual_memory().available // 2 - 2 * self.streamed.largest_unit_bytes)

    def _arrange(self) -> None:
        """Split the model into units; again if an adapter wrapped modules since."""
        modules = list(self.model.modules())
        if len(modules) == len(self._modules) and all(map(lambda a, b: a is b, modules, self._modules)):
            return
        self._modules = modules
        self._opened.close()
        self.streamed.arrange()
        self._opened.enter_context(self.streamed.between_units())
        self.streamed.place_head(self.device)
        self._loader = UnitLoader(self.streamed, self.device, keep=True, cache_bytes=self.settings.cache_bytes)
        self._opened.enter_context(self._loader)
        self._width = widest(self.streamed)
        inside = {module for part in parts_of(self.model, self.streamed) for module in part.modules()}
        self._outside = [unit for unit in self.streamed.units if unit.module not in inside]

    def report(self) -> Report:
        """Return what streaming promised and took so far."""
        adapter = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        unit, value_bytes, on_gpu = self.streamed.largest_unit_bytes, self.streamed.dtype.itemsize, self._meter.on_gpu
        graph = graph_bytes(self._width * self.step_tokens, value_bytes, on_gpu)
        hidden = getattr(self.streamed.config.get_text_config(), "hidden_size", 0)
        head = head_workspace(self.streamed, self.batch_tokens)
        head += states_bytes(hidden, value_bytes, self.batch_tokens, on_gpu)
        last = self.streamed.units[-1].weight_bytes
        workspace = step_bytes(unit, last, head, graph, ADAPTER_COPIES * adapter, on_gpu)
        held = self.streamed.host_bytes(on_gpu) + (0 if on_gpu else self.settings.cache_bytes)
        return self._meter.report(unit, workspace + held, self.streamed.checkpoint.bytes_read)


class _Plain(Stream):
    """A stream without gradients that shares loader and bar with others."""

    loader: UnitLoader | None = None
    bar: Shown | None = None

    def loading(self) -> Any:
        """Return the shared loader."""
        return nullcontext(self.loader)

    def progress(self) -> Any:
        """Return the shared bar."""
        return nullcontext(self.bar)


def parts_of(model: nn.Module, streamed: StreamedModel) -> list[nn.Module]:
    """List the models inside a model that hold units: backbones, encoders, decoders, whatever is called by itself."""
    from transformers import PreTrainedModel

    units = {unit.module for unit in streamed.units}
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module is not model
        and module not in units
        and not units.isdisjoint(module.modules())
    ]
