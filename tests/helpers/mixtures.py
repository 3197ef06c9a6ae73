"""Tiny mixtures of experts with transformers' experts interface, and the rows that their experts read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.tiny_models import CORPUS, TINY, causal, seeded, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.facts import DENSE, DOWN, UP, stack_tensor
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.quantize import dequantize_matrix
from onelayer.compiler.storage.checkpoint import Checkpoint

_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# Plain, with a fused gate; with more linears; transposed stacks with biases; shared experts next to the routed ones.
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": TINY["mixtral"],
    "qwen3_moe": TINY["qwen3_moe"],
    "gpt_oss": lambda: causal(
        "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, num_key_value_heads=4
    ),
    "deepseek_v3": lambda: causal(
        "DeepseekV3", first_k_dense_replace=1, n_shared_experts=1, num_key_value_heads=4, **_ROUTED, **_LATENT
    ),
}
_WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}
# Of experts that are wide enough for codes.
WIDE_MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: causal("Mixtral", intermediate_size=160, num_local_experts=4, num_experts_per_tok=2, **_WIDE),
    "qwen3_moe": lambda: causal(
        "Qwen3Moe",
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=192,
        **_WIDE,
    ),
}
IDS = torch.tensor([[5, 17, 40, 33, 8, 60, 21, 90, 14]])
WORDS = CORPUS[0].split() + CORPUS[1].split()
SETTINGS: dict[str, Any] = {"samples": 24, "max_length": 32, "device": "cpu"}


def save_mixture(
    name: str, root: Path, change: Callable[[Any], None] = lambda model: None, *, wide: bool = False
) -> Any:
    """Save a mixture, after some `change`, with tokenizer and calibration text below `root`; return the model."""
    model = seeded((WIDE_MIXTURES if wide else MIXTURES)[name])
    with torch.no_grad():
        change(model)
    model.save_pretrained(root / "model", max_shard_size="60KB")
    tiny_tokenizer(root / "model")
    rows = [" ".join(WORDS[(3 * i + j * (i % 5 + 1)) % len(WORDS)] for j in range(9)) for i in range(24)]
    (root / "mix.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return model


def compiled(root: Path, name: str = "emulator", **changes: Any) -> Any:
    """Compile what `save_mixture` saved; return the result."""
    return compile_emulator(root / "model", root / "mix.jsonl", root / name, **{"ratio": 0.5, **SETTINGS, **changes})


def modules_of_experts(model: Any) -> dict[str, Any]:
    """Find every module of experts, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def what_experts_read(model: Any, root: Path) -> dict[str, list[torch.Tensor]]:
    """Collect, for every stack by name, the rows (S, in) that each expert of the resident model reads.

    Computed from the class's own parameters and gate, for all tokens that its router sends to the expert.
    """
    calls: dict[str, list[Any]] = {name: [] for name in modules_of_experts(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
        for name, module in modules_of_experts(model).items()
    ]
    tokenizer = load_tokenizer(root / "model")
    tokens = read_tokens(root / "mix.jsonl", tokenizer, SETTINGS["max_length"], SETTINGS["samples"], 0)
    with torch.no_grad():
        for batch in make_batches(tokens, model.config, 1):
            model(**batch.inputs)
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in modules_of_experts(model).items():
        hidden = torch.cat([args[0] for args in calls[name]])
        index = torch.cat([args[1] for args in calls[name]])
        opening = [hidden[(index == expert).any(dim=1)] for expert in range(module.num_experts)]
        found[f"{name}.gate_up_proj"] = opening
        found[f"{name}.down_proj"] = [inner(module, expert, rows) for expert, rows in enumerate(opening)]
    return found


def inner(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Compute what the second matrix of an expert reads when its first reads `rows`."""
    with torch.no_grad():
        opened = rows @ weight_of(module, "gate_up_proj", expert).T
        bias = getattr(module, "gate_up_proj_bias", None)
        result: torch.Tensor = module._apply_gate(opened if bias is None else opened + bias[expert])
        return result


def weight_of(module: Any, leaf: str, expert: int) -> torch.Tensor:
    """Return (out, in) of one expert; the hidden width says how the stack is oriented."""
    weight: torch.Tensor = getattr(module, leaf)[expert].detach()
    hidden = module.config.hidden_size
    lies_as_linear = weight.shape[1 if leaf == "gate_up_proj" else 0] == hidden
    return weight if lies_as_linear else weight.T


def best_error(weight: torch.Tensor, rows: torch.Tensor, rank: int) -> float:
    """Compute the least relative error that factors of a rank can have on `rows`, by the outputs' own SVD."""
    values = torch.linalg.svdvals(rows.double() @ weight.double().T)
    return float(values[rank:].norm() / values.norm())


def error_of(product: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> float:
    """Compute the relative error on `rows` of a replacement of a weight (out, in)."""
    wanted = rows.double() @ weight.double().T
    return float((rows.double() @ product.double().T - wanted).norm() / wanted.norm())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def stack_products(directory: Path) -> dict[str, torch.Tensor]:
    """Form the replacement (E, out, in) of each stack."""
    emulator = Emulator.open(directory)
    factor_dtype, dtype = emulator.facts.quantized_dtype, torch.float32
    found = {}
    for name, facts in emulator.facts.stacks.items():
        count, out_features, in_features = facts.shape
        read = {end: emulator.checkpoint.tensors.get(stack_tensor(name, end)) for end in (UP, DOWN, DENSE)}
        held = {end: emulator.checkpoint.read(stack_tensor(name, end)) for end, info in read.items() if info}
        if factor_dtype is None:
            found[name] = held[UP] @ held[DOWN]
        elif DENSE in held:
            found[name] = torch.stack(
                [dequantize_matrix(held[DENSE][e], in_features, factor_dtype, dtype) for e in range(count)]
            )
        else:
            ups = [dequantize_matrix(held[UP][e], out_features, factor_dtype, dtype).T for e in range(count)]
            downs = [dequantize_matrix(held[DOWN][e], in_features, factor_dtype, dtype) for e in range(count)]
            found[name] = torch.stack([up @ down for up, down in zip(ups, downs, strict=True)])
    return found


def with_products(model: Any, directory: Path) -> Any:
    """Copy the original with an emulator's weights, run by transformers' own experts functions."""
    from helpers.reference_emulators import dense_reference

    reference = dense_reference(copy.deepcopy(model), directory)
    for name, product in stack_products(directory).items():
        path, _, leaf = name.rpartition(".")
        module = reference.get_submodule(path)
        stack = getattr(module, leaf)
        stack.data = (product if stack.shape == product.shape else product.mT).to(stack).contiguous()
        if module.is_transposed:
            stack.data = product.mT.to(stack).contiguous()
    return reference


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found
