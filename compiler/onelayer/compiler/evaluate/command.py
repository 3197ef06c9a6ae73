"""The scoring pass: loss, perplexity and accuracy of the original, with adapters and as its emulator, in one stream.

In: a checkpoint, a data set, PEFT adapters, an emulator. Out: one row of figures each. Held on the device: one unit,
the adapters, one micro-batch; the head goes by in slices of the vocabulary, each applied to every batch.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from onelayer.compiler.adapters.attach import adapted_model
from onelayer.compiler.adapters.fit import check_made_for
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_bytes
from onelayer.compiler.data.labeled_rows import DataSource
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.denoising.encoded import encoded_images
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.denoising import DenoisingScores, DenoisingScoring
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.evaluate.scoring import SampleScores, Scoring, scoring_workspace, total
from onelayer.compiler.evaluate.settings import EvaluateKeywords, EvaluateSettings
from onelayer.compiler.evaluate.variants import Variant, open_scored, switch_variants
from onelayer.compiler.libraries.library import library_of
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.linears import is_linear, stack_shapes
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import named_parts
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import model_digest, resolve_model
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream

# The exponential of a larger loss overflows float64, so such a perplexity is reported as the largest float.
LARGEST_LOSS = math.log(sys.float_info.max)


class Score(Result):
    """The figures of one model: `adapter` is None for the original alone; `loss` in nats per labeled token.

    `choice_accuracy` is the share of multiple-choice examples whose right choice has the highest log-likelihood; None
    if there are no such examples. For a sequence classifier `tokens` is the number of texts, and `token_accuracy` the
    share of texts whose class has the highest logit. `preference_accuracy` is the share of preferences whose better
    answer gained more log-likelihood over the original than the worse one; None for the original, and without any.
    For a denoiser `loss` is the mean squared error of its predictions on images of the subject, at fixed times and
    noises, `class_loss` that on images of the class, `tokens` the number of images, and `velocity_drift` the squared
    distance of the predictions from the original's, relative to their square, on class images if there are any.
    """

    adapter: str | None
    loss: float
    perplexity: float | None
    token_accuracy: float | None
    tokens: int
    choice_accuracy: float | None
    questions: int
    preference_accuracy: float | None = None
    preferences: int = 0
    class_loss: float | None = None
    velocity_drift: float | None = None


class Against(Result):
    """The distance of an emulator's predictions from the original's, over the labeled tokens.

    `kl_per_token` is the divergence of the emulator's distribution from the original's, in nats. `top1_agreement` is
    the share of tokens with the same best guess. Of a denoiser these are None, and `velocity_drift` is the distance.
    """

    emulator: str
    kl_per_token: float | None
    top1_agreement: float | None
    loss: float
    perplexity: float | None
    token_accuracy: float | None
    velocity_drift: float | None = None


class EvaluateResult(Result):
    """One score for the original and one for each adapter, in the order given; `against` if an emulator was given."""

    results: list[Score]
    against: Against | None
    report: Report


@settings_keywords(EvaluateSettings, EvaluateKeywords)
def evaluate_model(
    model: str | Path,
    data: DataSource,
    *,
    adapters: Sequence[str | Path] = (),
    against: str | Path | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> EvaluateResult:
    """Score the original and each of `adapters` on the labeled tokens of `data`, reading the checkpoint once.

    A `text` example is cut at `max_length` tokens, and all but the first are labeled. In `prompt`+`completion` the
    completion is labeled, in `messages` the assistant's turns, and in `prompt`+`choices` the right choice. A sequence
    classifier is scored on `text`+`label`. `against` compares an emulator with its original in the same pass. Hidden
    states beyond `host_memory_bytes` wait on disk. Raises `InputError` for what the caller can fix.
    """
    chosen = EvaluateSettings.of(settings)
    device = pick_device(chosen.device)
    directory = resolve_model(model, chosen.revision)
    named = {f"adapter{number}": _open_adapter(path, directory) for number, path in enumerate(adapters)}
    if library_of(directory).DENOISES:
        return _evaluate_denoiser(directory, data, dict(zip(named, adapters, strict=True)), named, against, chosen)
    adapted, classes = open_scored(directory, named)
    streamed = adapted.streamed
    emulator = None if against is None else _open_emulator(against, directory, streamed)
    reader = load_reader(directory, type(streamed.model), chosen.max_image_pixels)
    samples = Samples.read(data, reader, chosen.max_length, classes)
    batches = samples.batches(streamed.config, chosen.batch_size)
    variants = [Variant(), *(Variant(adapter=name) for name in named)]
    if emulator is not None:
        variants.append(Variant(emulator=emulator))
    spill_pool = SpillPool(chosen.host_memory_bytes)
    team = processes()
    job = Scoring(batches, len(variants), spill_pool, None if emulator is None else len(variants) - 1, team)
    with Meter(device) as meter:
        on_unit = switch_variants(adapted, variants, device)
        stream = Stream(streamed, device, meter, on_unit, spill_pool, description="evaluate", team=team)
        stream.run(job.inputs(), job.take)
        sums = job.finish(device)
        streamed.checkpoint.check_unchanged()
        if emulator is not None:
            emulator.checkpoint.check_unchanged()
        workspace = scoring_workspace(stream, batches, len(variants), compared=emulator is not None)
        workspace += replaced_bytes(streamed, adapted.replacements)
        workspace += streamed.host_bytes(meter.on_gpu)
        bytes_read = streamed.checkpoint.bytes_read
        if emulator is not None:
            workspace += _factor_bytes(emulator, streamed)
            bytes_read += emulator.checkpoint.bytes_read
        report = meter.report(streamed.largest_unit_bytes, workspace, bytes_read)
    scores = [
        score_of(name, scores, samples, sums[0])
        for name, scores in zip([None, *(str(path) for path in adapters)], sums, strict=False)
    ]
    compared = None if emulator is None else _compare(str(against), job, score_of(None, sums[-1], samples, sums[0]))
    return EvaluateResult(results=scores, against=compared, report=report)


def _evaluate_denoiser(
    directory: Path,
    data: DataSource,
    names: Mapping[str, str | Path],
    adapters: Mapping[str, Adapter],
    against: str | Path | None,
    settings: EvaluateSettings,
) -> EvaluateResult:
    """Score a denoiser on encoded images."""
    images, device, team = encoded_images(data, directory), pick_device(settings.device), processes()
    adapted = adapted_model(directory, adapters)
    streamed = adapted.streamed
    emulator = None if against is None else _open_emulator(against, directory, streamed)
    variants = [Variant(), *(Variant(adapter=name) for name in adapters)]
    variants += [] if emulator is None else [Variant(emulator=emulator)]
    spill_pool = SpillPool(settings.host_memory_bytes)
    job = DenoisingScoring.of(images, streamed.dtype, settings, len(variants), team)
    with Meter(device) as meter:
        on_unit = switch_variants(adapted, variants, device)
        stream = Stream(streamed, device, meter, on_unit, spill_pool, description="evaluate", team=team)
        stream.run(job.inputs(), job.take)
        scores = job.finish()
        streamed.checkpoint.check_unchanged()
        workspace = job.workspace(stream)
        workspace += replaced_bytes(streamed, adapted.replacements)
        bytes_read = streamed.checkpoint.bytes_read
        if emulator is not None:
            emulator.checkpoint.check_unchanged()
            workspace += _factor_bytes(emulator, streamed)
            bytes_read += emulator.checkpoint.bytes_read
        report = meter.report(streamed.largest_unit_bytes, workspace, bytes_read)
    adapter_names = [None, *(str(path) for path in names.values())]
    results = [_denoising_score(name, score) for name, score in zip(adapter_names, scores, strict=False)]
    compared = None
    if emulator is not None:
        fields = {"kl_per_token": None, "top1_agreement": None, "perplexity": None, "token_accuracy": None}
        drift = scores[-1].drift
        compared = Against(emulator=str(against), loss=scores[-1].loss, velocity_drift=drift, **fields)
    return EvaluateResult(results=results, against=compared, report=report)


def _denoising_score(adapter: str | None, scores: DenoisingScores) -> Score:
    return Score(
        adapter=adapter,
        loss=scores.loss,
        perplexity=None,
        token_accuracy=None,
        tokens=scores.images,
        choice_accuracy=None,
        questions=0,
        class_loss=scores.class_loss,
        velocity_drift=scores.drift,
    )


def _open_adapter(path: str | Path, model: Path) -> Adapter:
    """Open an adapter; refuse by name one that is not plain LoRA or was made for another original."""
    adapter = Adapter.open(path)
    if adapter.recorded_digest("base") is not None:  # this reads all weights if they were never hashed
        check_made_for(adapter, model, model_digest(model))
    return adapter


def score_of(adapter: str | None, sums: SampleScores, samples: Samples, original: SampleScores) -> Score:
    """Compute the figures of one model from the sums of every sample."""
    tokens = int(total(sums.counts, samples.counted))
    loss = sums.loss(samples.counted)
    questions = len(samples.questions)
    compared = samples.pairs if adapter is not None else []
    preferred = sums.right_preferences(original, compared) / len(compared) if compared else None
    return Score(
        adapter=adapter,
        loss=loss,
        perplexity=math.exp(min(loss, LARGEST_LOSS)),
        token_accuracy=total(sums.hits, samples.counted) / tokens,
        tokens=tokens,
        choice_accuracy=sums.right_answers(samples.questions) / questions if questions else None,
        questions=questions,
        preference_accuracy=preferred,
        preferences=len(samples.pairs),
    )


def _open_emulator(path: str | Path, model: Path, streamed: StreamedModel) -> Emulator:
    """Open an emulator of this original. Raises `InputError` if it belongs to another, or names what is no linear."""
    emulator = Emulator.open(path)
    emulator.check_original(model)
    linears = {name for unit in streamed.units for name, module in named_parts(unit) if is_linear(module)}
    if unknown := emulator.facts.compressed.keys() - linears:
        raise InputError(f"{emulator.directory}: {min(unknown)} is no linear of {model}; compile the emulator again")
    if unknown := emulator.facts.stacks.keys() - stack_shapes(streamed).keys():
        raise InputError(f"{emulator.directory}: {min(unknown)} are no experts of {model}; compile the emulator again")
    return emulator


def _factor_bytes(emulator: Emulator, streamed: StreamedModel) -> int:
    """Count the factors of the unit that has most of them; their inner activations are smaller than the unit's own."""
    tensors = emulator.checkpoint.tensors.values()
    return max(
        (sum(info.size_bytes for info in tensors if info.name.startswith(f"{unit.name}.")) for unit in streamed.units),
        default=0,
    )


def _compare(path: str, job: Scoring, score: Score) -> Against:
    kl_per_token, agreement = job.divergence()
    return Against(
        emulator=path,
        kl_per_token=kl_per_token,
        top1_agreement=agreement,
        loss=score.loss,
        perplexity=score.perplexity,
        token_accuracy=score.token_accuracy,
    )
