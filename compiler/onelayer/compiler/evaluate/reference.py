"""The reference of preference tuning: log-probabilities of answers under the original, by one streamed pass.

In: a checkpoint and token rows. Out: the sum of the log-probabilities of each row's labeled tokens, stored under the
row's digest, so that training finds it whatever the order of its rows. Held on the device: one unit, one micro-batch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Unpack

import torch
from pydantic import BaseModel, ConfigDict

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.preferences import (
    PreferenceMethod,
    mismatched_answers,
    read_preferences,
    row_key,
)
from onelayer.compiler.data.tokens import Tokens, load_tokenizer
from onelayer.compiler.documents import checked_document
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.scoring import Scoring, scoring_workspace
from onelayer.compiler.evaluate.settings import EvaluateKeywords, EvaluateSettings
from onelayer.compiler.evaluate.variants import open_scored
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.sources.data_set import DataSource
from onelayer.compiler.storage.checkpoint import model_digest, resolve_model
from onelayer.compiler.storage.files import atomic_directory, check_output, read_json, write_json
from onelayer.compiler.streaming.spill import SpillPool
from onelayer.compiler.streaming.stream import Stream

REFERENCE_FILE = "reference.json"


class ReferenceResult(Result):
    """The number of answers that were scored, and what the pass cost."""

    output: str
    answers: int
    report: Report


class Reference(BaseModel):
    """Log-probabilities in nats by the digests of their rows, and the digest of the original that gave them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    kind: Literal["reference"] = "reference"
    base_digest: str
    log_probabilities: dict[str, float]

    @classmethod
    def open(cls, directory: Path) -> "Reference":
        """Read what `reference_scores` wrote. Raises `InputError` if it is damaged."""
        file = directory / REFERENCE_FILE
        return checked_document(cls, read_json(file), file, "make it again")

    def of(self, rows: Mapping[str, Tokens]) -> Mapping[str, float]:
        """Return the values for these rows. Raises `InputError` if one is missing."""
        missing = rows.keys() - self.log_probabilities.keys()
        if missing:
            raise InputError(
                f"the reference knows {len(rows) - len(missing)} of {len(rows)} answers; make it from the same data, "
                "method, max_length and batch size as the training"
            )
        return self.log_probabilities


@settings_keywords(EvaluateSettings, EvaluateKeywords)
def reference_scores(
    model: str | Path,
    data: DataSource,
    output: str | Path,
    *,
    method: PreferenceMethod,
    train_batch_size: int,
    eval_data: DataSource | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> ReferenceResult:
    """Score all answers of `data` and `eval_data` under `model`, and write the log-probabilities to a directory.

    KTO also needs every prompt with the answer of the row before it in its batch of `train_batch_size` rows. Raises
    `InputError` for unusable input.
    """
    chosen = EvaluateSettings.of(settings)
    output = Path(output)
    check_output(output, model)
    directory = resolve_model(model, chosen.revision)
    tokenizer = load_tokenizer(directory)
    rows: dict[str, Tokens] = {}
    for source in [data] if eval_data is None else [data, eval_data]:
        preferences, _ = read_preferences(source, method, tokenizer, chosen.max_length)
        others = mismatched_answers(preferences, train_batch_size) if method == "kto" else None
        for number, item in enumerate(preferences):
            rows |= {row_key(row): row for row in item.rows(*([] if others is None else [others[number]]))}
    reference, report = score_rows(directory, rows, chosen)
    with atomic_directory(output) as partial:
        write_json(partial / REFERENCE_FILE, reference.model_dump(mode="json"))
    return ReferenceResult(output=str(output), answers=len(rows), report=report)


def score_rows(directory: Path, rows: Mapping[str, Tokens], settings: EvaluateSettings) -> tuple[Reference, Report]:
    """Compute the log-probability of the labeled tokens of each row under the original, reading it once."""
    device, spill_pool = pick_device(settings.device), SpillPool(settings.host_memory_bytes)
    adapted, classes = open_scored(directory, {})
    if classes is not None or adapted.streamed.config.is_encoder_decoder:
        raise InputError(f"{directory}: preferences are for models that predict the next token; give such a model")
    streamed = adapted.streamed
    batches = make_batches(list(rows.values()), streamed.config, settings.batch_size)
    scoring = Scoring(batches, 1, spill_pool)
    with Meter(device) as meter:
        stream = Stream(streamed, device, meter, spill_pool=spill_pool, description="reference")
        stream.run(scoring.inputs(), scoring.take)
        (scores,) = scoring.finish(device)
        streamed.checkpoint.check_unchanged()
        workspace = scoring_workspace(stream, batches, 1)
        report = meter.report(streamed.largest_unit_bytes, workspace, streamed.checkpoint.bytes_read)
    values = dict(zip(rows, (-loss for loss in scores.losses), strict=True))
    if not torch.tensor(list(values.values())).isfinite().all():
        raise FloatingPointError(f"{directory}: a log-probability is not finite; check the model")
    return Reference(base_digest=model_digest(directory), log_probabilities=values), report
