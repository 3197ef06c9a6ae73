"""Speech to text: recordings with transcripts through every command."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.commands import refused, run, through_every_command
from helpers.media_files import picture, recording
from helpers.tiny_speech import SECONDS, noise, save_whisper, write_transcripts
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_whisper(folder / "model")
    write_transcripts(folder / "data")
    return folder


def loaded(model: Path) -> Any:
    return transformers.AutoModelForSpeechSeq2Seq.from_pretrained(model).eval()


def reader(folder: Path) -> Any:
    return load_reader(folder / "model", transformers.WhisperForConditionalGeneration)


def rows_of(folder: Path, data: Path | None = None) -> list[Tokens]:
    return read_tokens(data or folder / "data", reader(folder), 32)


def resident_loss(model: Any, folder: Path) -> float:
    """Compute the mean loss as the documentation of transformers does: one recording at a time, with `labels`."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    total = count = 0.0
    import soundfile  # type: ignore[import-untyped]

    for line in (folder / "data" / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        samples, rate = soundfile.read(folder / "data" / row["file_name"], dtype="float32")
        features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
        labels = torch.tensor([processor.tokenizer(row["text"]).input_ids[1:]])  # the decoder starts with the first
        with torch.no_grad():
            loss = model(input_features=features, labels=labels).loss
        total, count = total + float(loss) * labels.shape[1], count + labels.shape[1]
    return total / count


def test_a_folder_of_transcripts_goes_through_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = folder / "model", folder / "made"
    emulator, polished, scored = through_every_command(capsys, folder, "--model", model, "--anchor-every", "2")
    assert {item["name"].split(".")[1] for item in emulator["linears"]} == {"encoder", "decoder"}
    original, adapted = scored["results"]
    assert original["loss"] == pytest.approx(resident_loss(loaded(model), folder), abs=1e-6)
    assert adapted["loss"] == pytest.approx(resident_loss(loaded(made / "merged"), folder), abs=1e-6)
    assert adapted["loss"] < polished["steps"][0]["loss"] < original["loss"]
    for name in ("emulator", "merged"):
        assert (made / name / "processor_config.json").is_file()


def test_streamed_logits_are_the_resident_ones(folder: Path) -> None:
    resident, rows = loaded(folder / "model"), rows_of(folder)
    batches = make_batches(rows, resident.config, 2)
    assert all(batch.inputs.keys() == {"decoder_input_ids", "input_features"} for batch in batches)
    assert len(batches) < len(rows), "rows of equal shapes share a batch"
    found: dict[int, Any] = {}
    with Meter(torch.device("cpu")) as meter:
        stream = Stream(StreamedModel(folder / "model"), torch.device("cpu"), meter)
        stream.run([batch.inputs for batch in batches], found.__setitem__)
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = resident(**batch.inputs, use_cache=False).logits
        logits = found[index].logits
        assert torch.equal(logits.materialize() if isinstance(logits, DeferredLogits) else logits, expected)


def test_a_streamed_original_learns_like_the_resident_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--data", folder / "data", "--max-steps", "1", "--batch-size", "6", "--learning-rate", "0.01")
    trained = [
        run(capsys, "train", folder / "model", *asked, "--output", tmp_path / way, "--way", way)
        for way in ("resident", "streamed")
    ]
    assert trained[0]["losses"] == trained[1]["losses"]
    resident, streamed = (load_file(tmp_path / way / "adapter_model.safetensors") for way in ("resident", "streamed"))
    assert resident.keys() == streamed.keys()
    for name, tensor in resident.items():
        torch.testing.assert_close(streamed[name], tensor, rtol=1e-3, atol=1e-5)  # of a step of 0.01


def test_a_transcript_is_learned_and_its_start_token_is_not(folder: Path, tmp_path: Path) -> None:
    [row] = rows_of(folder, _rows(tmp_path, {"audio": recording(tmp_path / "a.wav").name, "text": "red blue"}))
    shown = reader(folder).tokenizer.decode(row.labels)
    assert shown == "<|en|><|transcribe|><|notimestamps|>red blue<|endoftext|>"
    assert row.input_ids == row.labels


def test_tables_name_recordings_too(folder: Path, tmp_path: Path) -> None:
    recording(tmp_path / "a.wav")
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("a.wav", "red")])
    [by_table] = rows_of(folder, tmp_path)
    (tmp_path / "metadata.csv").unlink()
    [by_row] = rows_of(folder, _rows(tmp_path, {"audio": {"bytes": None, "path": "a.wav"}, "text": "red"}))
    assert by_table == by_row
    assert by_table.inputs is not None
    assert by_row.inputs is not None
    assert by_table.inputs.digest == by_row.inputs.digest


def _rows(folder: Path, row: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_rows_that_cannot_be_transcribed_are_refused_by_one_line(folder: Path, tmp_path: Path) -> None:
    recording(tmp_path / "a.wav")
    noise(tmp_path / "long.wav", SECONDS + 0.5, 0)
    picture().save(tmp_path / "a.png")
    for row, words in (
        ({"audio": "long.wav", "text": "red"}, r"long.wav: 1.5 s of sound, and the model hears 1 s; split the row"),
        ({"audio": "a.wav", "text": "red " * 40}, r"its text has 32 tokens|its text has .* and the model writes at"),
        ({"image": "a.png", "text": "red"}, r"a.png: the model reads audio, and no image"),
        ({"text": "red"}, r"the model writes the text of one audio; write rows of 'audio', 'text'"),
        ({"audios": ["a.wav", "a.wav"], "text": "red"}, r"the model writes the text of one audio"),
        ({"audio": "a.wav", "prompt": "what?", "completion": "red"}, r"the model writes the text of one audio"),
        ({"audio": "a.wav", "label": "red"}, r"the model writes the text of one audio"),
    ):
        with pytest.raises(InputError, match=rf"rows.jsonl:1: .*{words}") as caught:
            read_tokens(_rows(tmp_path, row), reader(folder), 64)
        assert "\n" not in str(caught.value)


def test_alignment_models_are_refused_by_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, conv_dim=[16],
        conv_stride=[5], conv_kernel=[10], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "m")
    output = tmp_path / "out"
    for command in (
        ("compile", tmp_path / "m", "--calibration", folder / "data", "--output", output),
        ("train", tmp_path / "m", "--data", folder / "data", "--output", output),
        ("evaluate", tmp_path / "m", "--data", folder / "data"),
    ):
        assert "Wav2Vec2ForCTC aligns text with sound by CTC, which is not supported" in refused(capsys, *command)
    assert not output.exists()


def test_a_prompt_is_no_recording(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "writes what it hears" in refused(capsys, "generate", folder / "model", "--prompt", "red")
