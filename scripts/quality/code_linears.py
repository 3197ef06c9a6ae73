"""Some linears of a causal model, with what they read and the gradients that come back to them, for `code_errors`."""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onelayer.compiler.codes.forms import group_size
from onelayer.compiler.codes.moments import BlockGram

HEAD = "lm_head"
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TOKENS, HEAD_TOKENS = 256, 32


@dataclass(frozen=True)
class Rows:
    """What a linear reads (N, I) and the gradients at its outputs (N, O)."""

    x: torch.Tensor
    g: torch.Tensor


@dataclass(frozen=True)
class Linear:
    """A weight (O, I), with rows for calibration and held-out rows."""

    name: str
    W: torch.Tensor
    calibration: Rows
    held_out: Rows

    def errors(self, E: torch.Tensor) -> tuple[float, float]:
        """Return the squared errors of E (O, I), forward and weighted by both sides, relative to those of W."""
        x, g = self.held_out.x, self.held_out.g
        H = x.T @ x
        parts = [(float(((M @ H) * M).sum()), float((((g @ M).T @ (g @ M)) * H).sum())) for M in (E, self.W)]
        return parts[0][0] / parts[1][0], parts[0][1] / parts[1][1]


def read_linears(given: argparse.Namespace) -> list[Linear]:
    """Run rows forward and back; keep what some linears read and the gradients that come back to them."""
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    names = [f"model.layers.{layer}.{linear}" for layer in given.layers for linear in LINEARS]
    names += [HEAD] if "outputs" in given.what else []
    found: dict[str, list[list[Rows]]] = {name: [[], []] for name in names}
    held_out = False

    def hook(name: str, module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        count = HEAD_TOKENS if name == HEAD else TOKENS  # the head's gradients are wide, so fewer rows are kept
        x, kept = args[0][0, :count].detach().clone(), found[name][held_out]
        output.register_hook(lambda g: kept.append(Rows(x, g[0, :count].detach().clone())))

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(hook, name))
    model.requires_grad_(False)
    with given.data.open() as lines:
        texts = (json.loads(line)["text"] for line in lines)
        for number, text in enumerate(islice(texts, given.rows + given.held_out)):
            held_out = number >= given.rows
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS).input_ids
            inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=inputs, labels=ids).loss.backward()

    def joined(rows: list[Rows]) -> Rows:
        return Rows(torch.cat([item.x for item in rows]), torch.cat([item.g for item in rows]))

    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    return [Linear(name, weights[name], *map(joined, parts)) for name, parts in found.items()]


def moments_of(x: torch.Tensor) -> torch.Tensor:
    """Return the moments of inputs as codes use them."""
    assert group_size(x.shape[1]) == x.shape[1]
    gram = BlockGram(x.shape[1], x.device)
    gram.add(x)
    return gram.blocks
