"""Checks packing for the sweep: the gradients of packed rows, and the verdict of the product's own check."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.packing import join_rows
from onelayer.compiler.data.tokens import IGNORED, Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.packing_check import change_of, check_takes_positions
from scripts.sweep.inputs import random_ids

LENGTHS = (17, 12, 9, 6)
# Relative to a parameter's largest gradient: the differences that rounding explains in float64 and in float32.
EXACT, ROUNDING = 1e-6, 1e-5


def packing_verdict(model: PreTrainedModel, registry: str) -> tuple[str, str]:
    """Judge ('exact' | 'refused' | 'missed' | 'refused for nothing', detail): float64 gradients against the check.

    The check runs in float32 and in bfloat16, whose rounding hides more. 'missed' means that it lets a leak pass.
    """
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 100))
    ids = [(random_ids(1, length, seed) % vocabulary)[0].tolist() for seed, length in enumerate(LENGTHS)]
    rows = [Tokens(row, row) for row in ids]
    _loss(model, rows[0])
    try:
        check_takes_positions(model)
    except InputError as error:
        return "refused", str(error)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # fresh weights are so small that rounding would hide a leak
                parameter.mul_(4)
    words = []
    for dtype in (torch.float32, torch.bfloat16):
        asked: Any = copy.deepcopy(model)
        asked = asked.to(dtype)
        with torch.no_grad():
            together = _loss(asked, join_rows(rows)).double()
            alone = torch.cat([_loss(asked, row) for row in rows]).double()
        change, allowed = change_of(together, alone, LENGTHS[0] - 1, dtype)
        words.append((change <= allowed, f"{change:.1e} of {allowed:.1e} allowed"))
    detail = "; ".join(word for _, word in words)
    try:
        distance, allowed = _distance(copy.deepcopy(model).double(), rows), EXACT
    except (NotImplementedError, RuntimeError, TypeError):  # some compute a part in float32 in any dtype
        distance, allowed = _distance(model, rows), ROUNDING
    detail = f"gradients {distance:.1e} apart; {detail}"
    if distance <= allowed:
        return ("exact" if all(accepted for accepted, _ in words) else "refused for nothing"), detail
    if words[0][0]:
        return "missed", detail
    return ("missed in bfloat16" if words[1][0] else "refused"), detail


def _loss(model: PreTrainedModel, row: Tokens) -> torch.Tensor:
    """Compute cross-entropies of the labeled tokens of one row or one pack."""
    (batch,) = make_batches([row], model.config, 1)
    counted = batch.targets != IGNORED
    logits: Any = model(**batch.inputs).logits
    return torch.nn.functional.cross_entropy(logits[counted], batch.targets[counted], reduction="none")


def _distance(model: PreTrainedModel, rows: list[Tokens]) -> float:
    """Find the largest difference of a gradient, relative to its largest value or to a thousandth of all gradients'."""
    found = []
    for parts in ([join_rows(rows)], rows):
        model.zero_grad()
        torch.cat([_loss(model, part) for part in parts]).double().sum().backward()
        named = model.named_parameters()
        found.append({name: item.grad.clone() for name, item in named if item.grad is not None})
    packed, alone = found
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in alone.values())
    return max(
        float((packed[name] - gradient).abs().max() / gradient.abs().max().clamp_min(least))
        for name, gradient in alone.items()
    )
