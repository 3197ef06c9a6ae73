"""Adapters of every kind on small models of seven architectures; PEFT's own model is the oracle."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel

from helpers.classifiers import TEXTS, save_classifier, write_labeled
from helpers.peft_adapters import load_adapter, random_adapter
from helpers.tiny_models import CORPUS, DECODER, TINY, causal, seeded, tiny_tokenizer
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.labeled_rows import read_for
from onelayer.compiler.data.tokens import load_tokenizer


@dataclass(frozen=True)
class Shape:
    """One architecture: how its model is made, and the names of its modules."""

    make: Callable[[], Any]
    targets: tuple[str, ...]
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    norm: str = "norm"
    inner: str = "mlp"


def _llava() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=5,
    )
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


SHAPES: dict[str, Shape] = {
    "llama": Shape(TINY["llama"], ("q_proj", "up_proj")),
    "qwen2_tied": Shape(lambda: causal("Qwen2", tie_word_embeddings=True), ("q_proj", "up_proj")),
    "bert": Shape(lambda: None, ("query", "value"), "word_embeddings", "classifier", "LayerNorm", "intermediate"),
    "t5": Shape(TINY["t5"], ("q", "wo"), "shared", norm="final_layer_norm", inner="SelfAttention"),
    "gpt2": Shape(TINY["gpt2"], ("c_attn",), "wte", norm="ln_f"),
    "mamba": Shape(
        lambda: causal("Mamba", state_size=4, tie_word_embeddings=True),
        ("in_proj", "x_proj"),
        "embeddings",
        norm="norm_f",
        inner="dt_proj",
    ),
    "llava": Shape(_llava, ("q_proj", "up_proj")),
}


def kinds_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the fields of PEFT's `LoraConfig` for every kind that the architecture can have."""
    shape = SHAPES[name]
    targets, embedding, head = list(shape.targets), shape.embedding, shape.head
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "patterns": {"use_rslora": True, "rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[0]: 3}},
        "all biases": {"bias": "all"},
        "biases of linears": {"bias": "lora_only"},
        "saved head": {"modules_to_save": [head]},
        "saved embedding": {"modules_to_save": [embedding]},
        "saved norm": {"modules_to_save": [shape.norm]},
        "saved part": {"modules_to_save": [shape.inner]},
        "saved embedding, tied": {"modules_to_save": [embedding], "ensure_weight_tying": True},
        "adapted embedding": {"target_modules": [*targets, embedding]},
        "adapted embedding, tied": {"target_modules": [*targets, embedding], "ensure_weight_tying": True},
        "adapted head": {"target_modules": [*targets, head]},
        "changed embedding": {},
        "saved head, all biases": {"modules_to_save": [head], "bias": "all"},
        "token rows, adapted head": {"target_modules": [*targets, head], "trainable_token_indices": [9, 4]},
        "token rows": {"trainable_token_indices": [9, 4]},
        "token rows of the head": {"trainable_token_indices": {head: [9, 4]}},
        "token rows of both": {"trainable_token_indices": {embedding: [9, 4], head: [3]}},
    }
    if embedding != "embed_tokens":
        del kinds["changed embedding"]  # refused, since its key could be any weight's
    if name == "bert":
        del (
            kinds["token rows, adapted head"],
            kinds["token rows of the head"],
            kinds["token rows of both"],
        )  # its head has a row for each class
    return {kind: {"r": 3, "target_modules": targets, "task_type": None, **fields} for kind, fields in kinds.items()}


def save_model(name: str, root: Path) -> None:
    """Save a model to `root/model` and rows for it to `root/rows.jsonl`."""
    if name == "bert":
        save_classifier("bert", root / "model")
        write_labeled(root / "rows.jsonl", TEXTS[:3])
        return
    SHAPES[name].make().save_pretrained(str(root / "model"))
    tiny_tokenizer(root / "model")
    rows = [{"prompt": text[:6], "completion": text[6:16]} for text in CORPUS[:2]]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_model(root: Path, part: str | Path = "model") -> Any:
    """Load the stock model of a directory, resident."""
    return _model_class(root / "model").from_pretrained(root / part).eval()


@cache
def _model_class(directory: Path) -> Any:
    (name,) = transformers.AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, name)


def save_adapter(name: str, kind: str, root: Path) -> Path:
    """Save a random adapter of one kind to a folder of `root` unless it exists; return the folder."""
    fields, directory = kinds_of(name).get(kind, kinds_of(name)["plain"]), root / kind.replace(" ", "_")
    if directory.exists():
        return directory
    model = load_model(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = random_adapter(model, directory, fan_in_fan_out=name == "gpt2", **fields)
        if kind == "changed embedding":  # as after a training that resized or trained it outside of PEFT
            base: Any = adapted.get_base_model()
            table = base.get_input_embeddings().weight
            table.data += 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(5))
            adapted.save_pretrained(str(directory), save_embedding_layers=True)
    return directory


def by_peft(root: Path, adapter: Path) -> PeftModel:
    """Load the resident model with an adapter, by PEFT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
        warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")
        warnings.filterwarnings("ignore", message="ensure_weight_tying=True but")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return load_adapter(load_model(root), adapter)


def mean_loss(model: Any, root: Path, ended: bool = False) -> torch.Tensor:
    """Compute the mean loss of `root/rows.jsonl` over what is labeled; texts are `ended` as in training, or not."""
    losses = [torch.zeros(())]
    for batch in _batches(root, ended):
        logits, targets = model(**batch.inputs).logits.flatten(0, -2), batch.targets.flatten()
        losses.append(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    return torch.stack(losses).sum() / sum(int((batch.targets != -100).sum()) for batch in _batches(root, ended))


@cache
def _batches(root: Path, ended: bool) -> list[TokenBatch]:
    model, config = root / "model", transformers.AutoConfig.from_pretrained(root / "model")
    classes = predicted_classes(_model_class(model), config, model)
    rows = read_for(classes, root / "rows.jsonl", load_tokenizer(model), 64, append_eos=ended)
    return make_batches(rows, config, 1)
