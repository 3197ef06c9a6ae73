"""A tiny Whisper with a processor, and recordings with transcripts: a folder in, files in it out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers as library
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from helpers.tiny_models import HIDDEN, seeded

transformers: Any = library  # its classes are only partly typed
SECONDS, RATE_HZ = 1, 16000  # what the model hears at once
START, END = "<|startoftranscript|>", "<|endoftext|>"
SPECIAL = (END, START, "<|en|>", "<|transcribe|>", "<|notimestamps|>")
WORDS = ("red", "blue", "green", "red blue", "green green", "a blue one")


def whisper_tokenizer() -> Any:
    """Train a byte-level tokenizer on the transcripts; it writes English transcripts without times."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    written = {"language": "english", "task": "transcribe", "predict_timestamps": False}
    return transformers.WhisperTokenizer(
        vocab=bpe.get_vocab(), merges=merges, additional_special_tokens=list(SPECIAL), **written
    )


def save_whisper(directory: Path) -> Any:
    """Save a seeded Whisper of two layers on either side, with its processor; return the model."""
    tokenizer = whisper_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = transformers.WhisperConfig(
        **sides,
        vocab_size=len(tokenizer),
        d_model=HIDDEN,
        num_mel_bins=16,
        max_source_positions=50 * SECONDS,
        max_target_positions=32,
        init_std=0.2,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = seeded(lambda: transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(directory)
    features = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(directory)
    return model


def noise(path: Path, seconds: float, seed: int) -> Path:
    """Write a recording of noise of its own."""
    import soundfile  # type: ignore[import-untyped]

    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE_HZ))
    soundfile.write(path, samples, RATE_HZ)
    return path


def write_transcripts(folder: Path) -> Path:
    """Write recordings of unequal length, and a `metadata.jsonl` with what each says."""
    folder.mkdir(parents=True)
    rows = []
    for number, text in enumerate(WORDS):
        file = noise(folder / f"{number}.wav", 0.3 + 0.1 * number, number)
        rows.append({"file_name": file.name, "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
