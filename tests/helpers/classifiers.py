"""Tiny sequence classifiers and rows for them: a family goes in, a saved seeded model and labeled data come out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from helpers.tiny_models import DECODER, HIDDEN, VOCAB, build, tiny_tokenizer

NAMES = ["color", "city", "number"]
FAMILIES = ("bert", "llama")
TEXTS = (
    ("the quick brown fox", "color"), ("rome is a city", "city"), ("one plus two", "number"),
    ("blue jugs and boxes", "color"), ("what is the city", 1), ("five dozen", 2), ("the sum is eight", 2),
)  # fmt: skip


def save_classifier(family: str, directory: Path, **changes: Any) -> Any:
    """Save a model of two layers and three named classes, with its tokenizer; return the model."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    if family == "llama":
        model = build("LlamaConfig", "LlamaForSequenceClassification", **{**DECODER, **labels, **changes})
    else:
        shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "initializer_range": 0.2}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        fields = {**shape, **depth, **quiet, **labels, **changes}
        model = build("BertConfig", "BertForSequenceClassification", **fields)
    model.save_pretrained(str(directory))
    tiny_tokenizer(directory)
    return model


def write_labeled(path: Path, rows: Sequence[tuple[str, int | str]] = TEXTS) -> Path:
    """Write rows of `text` and `label` as a .jsonl file."""
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def row_losses(model: Any, directory: Path, rows: Sequence[tuple[str, int | str]] = TEXTS) -> tuple[Any, float]:
    """Compute the resident model's loss of every row, one row at a time, and its accuracy."""
    tokenizer = tiny_tokenizer()
    losses, hits = [], 0
    for text, label in rows:
        number = NAMES.index(label) if isinstance(label, str) else label
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.float()
        losses.append(F.cross_entropy(logits, torch.tensor([number])))
        hits += int(logits.argmax()) == number
    return torch.stack(losses), hits / len(rows)
