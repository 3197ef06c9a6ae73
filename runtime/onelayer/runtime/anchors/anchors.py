"""The anchors of one training run: offsets for the batches that come next, renewed by streaming the original over them.

In: a PEFT model of an emulator that is being trained, and its original. Out: for each batch, in order, a context in
which the emulator answers with the adapter what the original answered with it at the last renewal.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from onelayer.compiler.emulators.facts import EmulatorFacts
from onelayer.compiler.factors.offsets import CodedOffset
from onelayer.compiler.machine.console import Shown
from onelayer.compiler.machine.devices import move
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.unit_memory import anchoring_bytes
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Batch
from onelayer.compiler.streaming.unit_loads import UnitLoads
from onelayer.runtime.anchors.adapter_sums import added_in_place
from onelayer.runtime.anchors.hooks import AnchorHooks, Call
from onelayer.runtime.anchors.original import AdaptedOriginal, compressed_units, emulated_modules
from onelayer.runtime.anchors.report import AnchorReport
from onelayer.runtime.anchors.stream import HOST, OffsetStream

# What a collated batch of preferences holds for the loss alone.
PREFERENCE_INPUTS = {
    "completion_mask", "ref_chosen_logps", "ref_rejected_logps",
    "label", "ref_logps", "KL_completion_mask", "ref_KL_logps",
}  # fmt: skip
# KTO calls the model with other answers first, without gradients; their inputs have this before their names.
MISMATCHED = "KL_"
# The one entry of a denoiser's batch that it is called with, by name.
ARGUMENTS = "arguments"


class Anchors:
    """Offsets of `bits` bits a value for the units of `adapted`, a PEFT model of the emulator that `facts` describe.

    `precision()` is the context in which training computes. `on_unit(unit)` surrounds each unit of a stream. Raises
    `InputError` if the units of the original in `directory` do not correspond to those of the emulator.
    """

    def __init__(
        self,
        adapted: PeftModel,
        facts: EmulatorFacts,
        directory: Path,
        bits: int,
        meter: Meter,
        precision: Callable[[], AbstractContextManager[Any]],
        on_unit: Callable[[Unit], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.bits, self.adapted, self.meter, self.precision = bits, adapted, meter, precision
        self._on_unit = on_unit
        self.original = AdaptedOriginal(directory, adapted)
        units = compressed_units(self.original.streamed, facts)
        self._modules = emulated_modules(adapted, units)
        self._hooks = AnchorHooks(adapted, self._modules)
        # With a card, states wait on the host. A host that is the device itself would hold more of them the more steps
        # there are between renewals, so there they wait in files.
        self._spill_pool = SpillPool(None if meter.on_gpu else 0)
        self._waiting: deque[list[Call]] = deque()
        self._renewals, self._seconds, self._offset_bytes = 0, 0.0, 0
        self._loads = UnitLoads()

    @property
    def is_used_up(self) -> bool:
        """Whether every offset has been used, so that the next step begins with a renewal."""
        return not self._waiting

    def renew(self, batches: Sequence[Mapping[str, Any]], bar: Shown | None = None) -> None:
        """Find the offsets of `batches`, in the order in which they will be trained on, with the adapter as it is."""
        started = time.perf_counter()
        self.original.share_adapter()
        stream = OffsetStream(
            self.original.streamed,
            self.adapted.device,
            self.meter,
            self._on_unit,
            spill_pool=self._spill_pool,
            loads=self._loads,
            emulated=self._modules,
            bits=self.bits,
            precision=self.precision,
            bar=bar,
        )
        calls = [model_calls(batch, self.adapted) for batch in batches]
        inputs = [call for each in calls for call in each]
        with evaluating(self.adapted), added_in_place(self.adapted, self.original.streamed.model):
            found = iter(stream.find(inputs))
        self._waiting.extend([(call.get("input_ids"), next(found)) for call in each] for each in calls)
        self._renewals += 1
        self._offset_bytes = max(self._offset_bytes, sum(offset.stored_bytes for offset in self._offsets()))
        self._seconds += time.perf_counter() - started

    def _offsets(self) -> Iterator[CodedOffset]:
        """Yield the offsets that wait."""
        for calls in self._waiting:
            for _, by_unit in calls:
                for by_number in by_unit.values():
                    yield from by_number.values()

    def adapter(self) -> dict[str, torch.Tensor]:
        """Return a copy of what is trained, on the host."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.original.trained.items()}

    @contextmanager
    def using(self, adapter: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let the model have an earlier adapter inside `with`."""
        present = self.adapter()
        try:
            self._take(adapter)
            yield
        finally:
            self._take(present)

    def _take(self, adapter: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.original.trained.items():
                value.copy_(adapter[name])

    def next_batch(self) -> AbstractContextManager[None]:
        """Return the context in which the model is anchored for the next batch."""
        return self._hooks.anchored(self._waiting.popleft())

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hooks.remove()

    def report(self, every: int) -> AnchorReport:
        """Return the figures so far, with the number of steps between renewals."""
        streamed = self.original.streamed
        unit_bytes, on_gpu = streamed.largest_unit_bytes, self.meter.on_gpu
        workspace = anchoring_bytes(unit_bytes, self._loads.most_values(streamed), streamed.dtype.itemsize, on_gpu)
        workspace += streamed.host_bytes(on_gpu)
        return AnchorReport(
            every=every,
            bits=self.bits,
            renewals=self._renewals,
            seconds=round(self._seconds, 3),
            bytes_read=streamed.checkpoint.bytes_read,
            offset_bytes=self._offset_bytes,
            spilled_bytes=self._spill_pool.spilled_bytes,
            largest_unit_bytes=unit_bytes,
            workspace_bytes=workspace,
        )


def model_calls(batch: Mapping[str, Any], adapted: PeftModel) -> list[Batch]:
    """Return what the model is called with for a collated batch, on the host, without what only the loss needs.

    It is one call, or two for KTO, in the order in which they are made. A denoiser is called with the `arguments`.
    """
    if (arguments := batch.get(ARGUMENTS)) is not None:
        return [move(arguments, HOST)]
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    for name in PREFERENCE_INPUTS & inputs.keys():
        del inputs[name]
    labels = inputs.pop("labels", None)
    base: Any = adapted.get_base_model()
    if base.config.is_encoder_decoder and labels is not None and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
    mismatched = {name: inputs.pop(name) for name in list(inputs) if name.startswith(MISMATCHED)}
    first = {name.removeprefix(MISMATCHED): value for name, value in mismatched.items()}
    return [move(call, HOST) for call in (first, inputs) if call]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off inside `with`, and with it the recomputation of layers."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
