"""The scoring pass: loss, perplexity and token accuracy of the original, without and with adapters, in one stream.

In: a checkpoint, a data set, PEFT adapters. Out: one row of figures each. Held on the device: one unit, the adapters,
one micro-batch; the head goes by in slices of the vocabulary, each applied to every batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from onelayer.compiler.adapter import Adapter
from onelayer.compiler.calibration import DataSource, TokenBatch, make_batches, read_tokens
from onelayer.compiler.checkpoint import resolve_model
from onelayer.compiler.errors import InputError
from onelayer.compiler.lazy import SLICE_BYTES, DeferredLogits
from onelayer.compiler.measure import Meter, Report, Result
from onelayer.compiler.scores import TokenScores
from onelayer.compiler.stream import Stream, pick_device
from onelayer.compiler.tokens import IGNORED, load_tokenizer
from onelayer.compiler.units import StreamedModel, Unit


class Score(Result):
    """Figures of one model: `adapter` is None for the original alone; `loss` in nats per labelled token."""

    adapter: str | None
    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int


class EvaluateResult(Result):
    """One score for the original and one for each adapter, in the order given."""

    results: list[Score]
    report: Report


def evaluate_model(
    model: str | Path,
    data: DataSource,
    *,
    adapters: Sequence[str | Path] = (),
    max_length: int = 512,
    batch_size: int = 1,
    device: str | None = None,
    revision: str | None = None,
) -> EvaluateResult:
    """Score the original and each of `adapters` on the labelled tokens of `data`, reading the checkpoint once.

    A `text` example is cut at `max_length` tokens, all but the first labelled; of `prompt`+`completion` and `messages`
    the completion and the assistant turns are. Raises `InputError` for what the caller can mend.
    """
    if min(max_length, batch_size) < 1:
        raise InputError("--max-length and --batch-size must be at least 1")
    place = pick_device(device)
    directory = resolve_model(model, revision)
    for path in adapters:
        Adapter.open(path)  # refuses by name what is no plain LoRA
    streamed = StreamedModel(directory, _attach(adapters))
    if not streamed.model.can_generate():
        kind = type(streamed.model).__name__
        raise InputError(
            f"{directory}: {kind} predicts no next token, so there is no loss to measure; give a language model"
        )
    tokens = read_tokens(data, load_tokenizer(directory), max_length)
    batches = make_batches(tokens, streamed.config, batch_size)
    candidates = [None, *(f"adapter{number}" for number in range(len(adapters)))]
    job = _Scoring(batches, len(candidates))
    with Meter(place) as meter:
        stream = Stream(streamed, place, meter, around=_switching(candidates), description="evaluate")
        stream.run([batch.inputs for batch in batches for _ in candidates], job.take)
        scores = job.scores(place)
        report = meter.report(
            streamed.largest_unit_bytes, _workspace_bytes(streamed, batches), streamed.checkpoint.bytes_read
        )
    names = [None, *(str(path) for path in adapters)]
    return EvaluateResult(
        results=[_score(name, found) for name, found in zip(names, scores, strict=True)], report=report
    )


def _attach(adapters: Sequence[str | Path]) -> Callable[[PreTrainedModel], None]:
    """Lets PEFT wrap the empty model in every adapter; their own small weights are real, on the host."""

    def prepare(model: PreTrainedModel) -> None:
        wrapped: Any = None
        for number, path in enumerate(adapters):
            name = f"adapter{number}"
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, path, adapter_name=name, low_cpu_mem_usage=True)
            else:
                wrapped.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
        model.eval()

    return prepare


def _switching(candidates: Sequence[str | None]) -> Callable[[Unit], Any]:
    """Runs a unit with the adapter of the batch at hand: stream index i is batch i // n with candidate i % n."""

    @contextmanager
    def around(unit: Unit) -> Iterator[Callable[[int, Any, Any], Any]]:
        layers = [part for part in unit.module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        forward = type(unit.module).forward

        def run(index: int, args: Any, kwargs: Any) -> Any:
            name = candidates[index % len(candidates)]
            for layer in layers:
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter([name] if isinstance(layer, BaseTunerLayer) else name)
            return forward(unit.module, *args, **kwargs)

        yield run

    return around


class _Scoring:
    """Collects what the stream hands out, and scores it: deferred logits by slices of the head, once all are there."""

    def __init__(self, batches: Sequence[TokenBatch], candidates: int) -> None:
        self.batches = batches
        self.candidates = candidates
        self._found: dict[int, TokenScores] = {}
        self._waiting: dict[int, tuple[DeferredLogits, torch.Tensor]] = {}

    def take(self, index: int, output: Any) -> None:
        """One batch with one candidate has run through; keeps only what its labelled positions need."""
        targets = self.batches[index // self.candidates].targets
        rows = targets != IGNORED
        logits = output.logits
        self._found[index] = scores = TokenScores(targets[rows])
        if isinstance(logits, DeferredLogits):
            self._waiting[index] = (logits, logits.hidden[rows])
        else:
            scores.update(slice(None), logits[rows], 0)

    def scores(self, device: torch.device) -> list[list[TokenScores]]:
        """For each candidate the scores of all its batches."""
        if self._waiting:
            head = next(iter(self._waiting.values()))[0].head
            for start, stop in head.row_slices():
                weight = head.read(start, stop).to(device)
                for index, (logits, hidden) in self._waiting.items():
                    step = max(1, SLICE_BYTES // (4 * (stop - start)))
                    for first in range(0, len(hidden), step):
                        rows = slice(first, min(first + step, len(hidden)))
                        part = logits.slice_of(hidden[rows].to(device), weight, start, stop)
                        self._found[index].update(rows, part.cpu(), start)
        return [
            [scores for index, scores in sorted(self._found.items()) if index % self.candidates == number]
            for number in range(self.candidates)
        ]


def _score(adapter: str | None, found: Sequence[TokenScores]) -> Score:
    count = sum(len(scores.labels_N) for scores in found)
    loss = sum(scores.loss_sum for scores in found) / count
    return Score(
        adapter=adapter,
        loss=loss,
        perplexity=math.exp(loss),
        token_accuracy=sum(scores.correct for scores in found) / count,
        tokens=count,
    )


def _workspace_bytes(streamed: StreamedModel, batches: Sequence[TokenBatch]) -> int:
    """What scoring holds beside the largest unit: slices of the head and of its logits, the unit that is read ahead,
    and the activations of one micro-batch in the widest unit."""
    tokens = max(batch.targets.numel() for batch in batches)
    widths = [
        sum(streamed.bare_parameter(name).shape[0] for name in unit.parameters if name not in unit.lazy)
        for unit in streamed.units
    ]
    return 3 * SLICE_BYTES + streamed.largest_unit_bytes + tokens * max(widths) * 4
