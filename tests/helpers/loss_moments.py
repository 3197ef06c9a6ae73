"""Second moments of both sides of a resident model's linears, by plain autograd."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer


def moments(source: Path, max_length: int = 24) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute dense second moments of inputs and of output gradients, by autograd on the resident model."""
    model = LlamaForCausalLM.from_pretrained(source / "model", dtype=torch.float32).eval()
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def watch(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).double()
        inputs[name] = inputs.get(name, 0) + x.T @ x

        def back(gradient: torch.Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).double()
            outputs[name] = outputs.get(name, 0) + g.T @ g

        y.register_hook(back)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda m, args, out, name=name: watch(name, args[0], out))
    tokens = read_tokens(source / "mix.jsonl", load_tokenizer(source / "model"), max_length)
    for batch in make_batches(tokens, model.config, 1):
        logits = model(**batch.inputs).logits
        torch.nn.functional.cross_entropy(logits[0], batch.targets[0], reduction="sum").backward()
    return inputs, outputs
