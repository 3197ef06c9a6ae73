"""Adapter directories as training leaves them: what PEFT loads from one computes what was trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from helpers.peft_adapters import load_adapter, random_adapter
from helpers.tiny_models import tiny_llama
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.storage.files import read_json
from onelayer.runtime.training.adapter_directory import write_adapter_directory


def test_patterns_mean_the_same_after_a_reload(tmp_path: Path) -> None:
    """The first pattern that matches counts, and PEFT sorts what it saves: here the order turns around."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, "1.self_attn.q_proj": 5},
        "alpha_pattern": {"down_proj": 3, "0.mlp.down_proj": 9, "layers.1.self_attn.q_proj": 7},
    }
    assert all(list(pattern) != sorted(pattern) for pattern in patterns.values())
    targets = ["q_proj", "down_proj"]
    adapted = random_adapter(tiny_llama(), tmp_path / "peft", r=4, use_rslora=True, target_modules=targets, **patterns)
    base = {"model": "org/original", "revision": None}
    plain = {"quantization": None, "denoises": False}
    model: Any = SimpleNamespace(base=base, model_class=type(tiny_llama()), **plain)
    (tmp_path / "ours").mkdir()
    write_adapter_directory(tmp_path / "ours", adapted, model, {"kind": "adapter"})
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(tiny_llama(), tmp_path / "ours")(ids).logits, adapted(ids).logits)
    config = read_json(tmp_path / "ours/adapter_config.json")
    assert config["rank_pattern"] == {f"^model.layers.{layer}.self_attn.q_proj": 2 for layer in (0, 1)}
    layers: dict[str, Any] = {name: part for name, part in adapted.named_modules() if hasattr(part, "scaling")}
    for name, module in Adapter.open(tmp_path / "ours").modules.items():
        assert module.scaling == layers[f"base_model.model.{name}"].scaling["default"]
