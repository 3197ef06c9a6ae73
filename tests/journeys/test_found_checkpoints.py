"""Checkpoints as users find them: oddities are read correctly, or refused before work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.tiny_models import VOCAB, build, save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.runtime import load_emulator, train_lora
from onelayer.runtime.planning.read_shapes import read_shapes


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def data_file(folder: Path) -> Path:
    (folder / "data.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 4)
    return folder / "data.jsonl"


def test_the_dtype_is_that_of_most_stored_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, torch.bfloat16)
    edit_config(tmp_path, dtype=None)
    tensors = load_file(tmp_path / "model.safetensors")
    # The first tensor, and every norm, which are more tensors than linears here.
    first = sorted(tensors)[0]
    mixed = {name: value.float() if name == first or value.ndim == 1 else value for name, value in tensors.items()}
    save_file(mixed, tmp_path / "model.safetensors", {"format": "pt"})
    assert StreamedModel(tmp_path).dtype == torch.bfloat16
    assert read_shapes(tmp_path).value_bytes == 2


def test_a_bare_infinity_in_a_config(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
    sizes = {"state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8, "time_step_limit": (0.0, float("inf"))}
    model = build("Mamba2Config", "Mamba2ForCausalLM", **shape, **sizes, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    edit_config(tmp_path / "model", time_step_limit=[0.0, float("inf")])
    assert "Infinity]" in (tmp_path / "model" / "config.json").read_text()
    output = tmp_path / "emulator"
    compile_emulator(tmp_path / "model", data_file(tmp_path), output, ratio=0.5, samples=2, device="cpu")
    json.loads((output / "config.json").read_text(), parse_constant=pytest.fail)
    assert list(load_emulator(output).config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_tokens_beyond_the_table_are_refused(tmp_path: Path, command: str) -> None:
    model = build(
        "LlamaConfig",
        "LlamaForCausalLM",
        **{"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        num_attention_heads=4,
    )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    passes: dict[str, Callable[[], object]] = {
        "train": lambda: train_lora(tmp_path / "model", data_file(tmp_path), tmp_path / "adapter", max_steps=1),
        "evaluate": lambda: evaluate_model(tmp_path / "model", data_file(tmp_path), device="cpu"),
    }
    with pytest.raises(InputError, match=r"makes token \d+ and config\.json, field vocab_size, knows 20"):
        passes[command]()


def test_a_damaged_generation_config_is_refused_before_work(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_beams": "many", "max_new_tokens": -5}')
    with pytest.raises(InputError, match=r"generation_config\.json: .*; restore or remove the file"):
        StreamedModel(tmp_path)
    (tmp_path / "generation_config.json").write_text(transformers.GenerationConfig().to_json_string())
    StreamedModel(tmp_path)
