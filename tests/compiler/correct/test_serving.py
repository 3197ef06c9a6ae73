"""Corrected adapters under the key rules of the servers that load them: vLLM and llama.cpp's converter, also Ollama's.

The rules are written here as those programs document them, since neither is installed.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from helpers.peft_adapters import load_original, random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters.attach import short_targets
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import read_json

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def corrected(name: str, root: Path, **config: Any) -> Path:
    save_tiny(name, root / "model")
    model = load_original(root / "model")
    write_emulator(model, root / "model", root / "emulator", ratio=0.5)
    random_adapter(load_original(root / "model"), root / "adapter", **config)
    correct_adapter(root / "adapter", emulator=root / "emulator", model=root / "model", output=root / "out")
    return root / "out"


def loads_in_vllm(directory: Path, model: nn.Module) -> bool:
    """Apply vLLM's rules: it reads r, alpha and the target modules, and refuses biases, saved modules and DoRA.

    A key names A or B of a module. The last part of its name, like that of each target, names a linear or an embedding.
    """
    config = read_json(directory / "adapter_config.json")
    known = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    refused = config["modules_to_save"] or config["use_dora"] or config["bias"] != "none"
    keys = [
        re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        for key in load_file(directory / "adapter_model.safetensors")
    ]
    modules = [*config["target_modules"], *(key[1] for key in keys if key is not None)]
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return all(keys) and not refused and scaling == 1 and {name.rpartition(".")[2] for name in modules} <= known


def converts_to_gguf(directory: Path, model: Path) -> bool:
    """Apply llama.cpp's rules: every key is the name of a stored weight with A or B, and both are present.

    Only alpha is read from the config. Each module is scaled by alpha over its own rank.
    """
    config, tensors = read_json(directory / "adapter_config.json"), load_file(directory / "adapter_model.safetensors")
    pairs: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        side = re.search(r"\.lora_([AB])\.weight", key)
        if side is None:
            return False
        weight = re.sub(r"\.lora_[AB]\.weight", ".weight", key.replace("base_model.model.", ""))
        pairs.setdefault(weight, {})[side[1]] = tensor.shape[0 if side[1] == "A" else 1]
    whole = all(sides == dict.fromkeys("AB", config["lora_alpha"]) for sides in pairs.values())
    return whole and pairs.keys() <= Checkpoint.open(model).tensors.keys()


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_corrected_adapter_follows_the_rules_of_servers(name: str, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    out = corrected(name, tmp_path, r=2, lora_alpha=9, target_modules="all-linear", **odd)
    assert loads_in_vllm(out, load_original(tmp_path / "model"))
    assert converts_to_gguf(out, tmp_path / "model")
    assert not converts_to_gguf(tmp_path / "adapter", tmp_path / "model"), "as trained its ranks and alphas differ"
    targets = read_json(out / "adapter_config.json")["target_modules"]
    assert targets == (["down_proj", "gate_up_proj", "o_proj", "qkv_proj"] if name == "phi3" else LINEARS)


def test_what_servers_refuse_is_told_apart(tmp_path: Path) -> None:
    out = corrected("qwen2", tmp_path, r=2, target_modules=["q_proj"], bias="all")
    assert not loads_in_vllm(out, load_original(tmp_path / "model"))
    assert not converts_to_gguf(out, tmp_path / "model")


def test_a_short_name_that_means_more_is_not_used(tmp_path: Path) -> None:
    out = corrected("llama", tmp_path, r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    targets = read_json(out / "adapter_config.json")["target_modules"]
    assert targets == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert loads_in_vllm(out, load_original(tmp_path / "model"))


def test_a_short_name_that_peft_takes_for_experts_is_not_used(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model: Any = load_original(tmp_path)
    model.w1 = nn.Linear(2, 2)  # a linear with the name that experts had before they were stacked
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert short_targets(model, attention) == ["q_proj"]
    assert short_targets(model, [*attention, "w1"]) == [*attention, "w1"]
