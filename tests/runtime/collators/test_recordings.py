"""Batches of recordings of unequal length: what each row gives in them is what it gives alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.tiny_speech import noise, save_whisper, write_transcripts
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.labeled_rows import read_for, read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED, Tokens
from onelayer.compiler.errors import InputError
from onelayer.runtime.collators.classes import ClassCollator
from onelayer.runtime.collators.transcripts import TranscriptCollator
from scripts.sweep.classifiers import NAMES, SHAPE, WAVES

pytestmark = pytest.mark.filterwarnings("ignore")


def classified(folder: Path, norm: str, mask: bool) -> tuple[Any, list[Tokens]]:
    """Save a Wav2Vec2 classifier and three recordings of unequal length; return it with its rows."""
    fields: dict[str, Any] = {**SHAPE, **WAVES, **NAMES, "feat_extract_norm": norm}
    config = transformers.Wav2Vec2Config(**fields)
    torch.manual_seed(0)
    model: Any = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask).save_pretrained(folder)
    rows = [
        {"audio": noise(folder / f"{n}.wav", seconds, n).name, "label": n}
        for n, seconds in enumerate((0.1, 0.25, 0.17))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classes = predicted_classes(type(model), model.config, folder)
    return model, read_for(classes, folder / "rows.jsonl", load_reader(folder, type(model)), 8)


def test_a_padded_batch_of_recordings_gives_each_what_it_gives_alone(tmp_path: Path) -> None:
    model, rows = classified(tmp_path, "layer", mask=True)
    features = [{"labels": row.label, "row": number} for number, row in enumerate(rows)]
    batch = ClassCollator([row.inputs for row in rows])(features)
    assert batch.pop("labels").tolist() == [0, 1, 2]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1600, 4000, 2720]
    with torch.no_grad():
        together = model(**batch).logits
        for number, row in enumerate(rows):
            assert row.inputs is not None
            alone = model(**row.inputs.tensors()).logits[0]
            torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-6)
            unmasked = model(batch["input_values"]).logits[number]
            assert number == 1 or not torch.allclose(unmasked, alone, rtol=1e-3), "the mask matters"


def test_recordings_of_unequal_length_need_a_mask(tmp_path: Path) -> None:
    _, rows = classified(tmp_path, "group", mask=False)
    features = [{"labels": row.label, "row": number} for number, row in enumerate(rows)]
    collator = ClassCollator([row.inputs for row in rows])
    with pytest.raises(InputError, match=r"--batch-size: recordings of unequal length make no batch, since .* a mask"):
        collator(features)
    assert collator(features[:1])["input_values"].shape == (1, 1600)


def test_a_recording_that_changes_is_named_in_a_padded_batch_too(tmp_path: Path) -> None:
    _, rows = classified(tmp_path, "layer", mask=True)
    noise(tmp_path / "1.wav", 0.25, 9)
    features = [{"labels": row.label, "row": number} for number, row in enumerate(rows)]
    with pytest.raises(InputError, match=r"1.wav: changed while it was in use"):
        ClassCollator([row.inputs for row in rows])(features)


def test_a_batch_of_transcripts_has_the_loss_of_its_rows(tmp_path: Path) -> None:
    model = save_whisper(tmp_path / "m")
    rows = read_tokens(write_transcripts(tmp_path / "data"), load_reader(tmp_path / "m", type(model)), 32)
    features = [{"labels": row.labels, "row": number} for number, row in enumerate(rows)]
    batch = TranscriptCollator([row.inputs for row in rows], model.config)(features)
    assert set(batch) == {"input_features", "decoder_input_ids", "labels"}
    assert bool((batch["labels"] == IGNORED).any()), "some transcript is shorter than another"
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for number, row in enumerate(rows):
            assert row.inputs is not None
            alone = model(**row.inputs.tensors(), labels=torch.tensor([row.labels]))
            kept = labels[number] != IGNORED
            loss = torch.nn.functional.cross_entropy(together[number][kept], labels[number][kept])
            assert float(loss) == pytest.approx(float(alone.loss), abs=1e-5)
