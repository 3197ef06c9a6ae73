"""Adapters that were trained on codes: corrected against exactly the weights that trained, by the closed form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.correct.command import correct_adapter
from onelayer.runtime import train_lora

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
TEXTS = ["the quick brown fox jumps over the lazy dog", "what is the sum of two and three ?", "name a city ; rome"]


@pytest.mark.parametrize(("dtype", "is_anchored"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_the_corrected_adapter_is_the_closed_form_of_what_trained(
    tmp_path: Path, dtype: torch.dtype, is_anchored: bool
) -> None:
    original, emulator, data = tmp_path / "original", tmp_path / "emulator", tmp_path / "data.jsonl"
    model = causal("Llama", num_hidden_layers=1, **SHAPE).to(dtype)
    model.save_pretrained(original)
    tiny_tokenizer(original)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    coded: dict[str, Any] = {"form": "coded", "keep_bytes": 0.25, "backward": False, "max_length": 16}
    compile_emulator(original, data, emulator, **coded)
    anchor: dict[str, Any] = {"model": original, "anchor_every": 2} if is_anchored else {}
    train_lora(emulator, data, tmp_path / "trained", max_steps=2, learning_rate=1e-2, lora_rank=4, **anchor)
    correct_adapter(tmp_path / "trained", emulator=emulator, model=original, output=tmp_path / "out", limit=None)

    loaded: Any = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    trained, corrected = Adapter.open(tmp_path / "trained"), Adapter.open(tmp_path / "out")
    assert len(trained.modules) == 7
    for name, module in trained.modules.items():
        (a, b), (a_c, b_c) = ([part.double() for part in each.factors(name)] for each in (trained, corrected))
        inputs = torch.eye(module.in_features, dtype=torch.float64)
        E, W = loaded.get_submodule(name)(inputs).T, model.get_submodule(name).weight.detach().double()
        wanted = (E - W) @ a.T @ torch.linalg.pinv(a.T) + module.scaling * b @ a
        found = corrected.modules[name].scaling * b_c @ a_c
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, name
