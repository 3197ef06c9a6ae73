"""Formulas for the memory of one resident unit, torch-free; planner and passes share them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


# Of every trained value in float32: itself, its gradient, what it was, Adam's two moments, and as it is rounded; that
# once more in the model's dtype, if it is another.
VALUE_BYTES = 26
# Of the widest linear: what a factor becomes on the way to its stored form and back.
ROUNDING_BYTES = 16


def training_bytes(values: Sequence[int], width: int, batch_tokens: int, value_bytes: int, on_gpu: bool) -> int:
    """What training one unit holds beside its weights, at most.

    `values` of each linear are trained; `width` is how many values the unit makes of a token.
    """
    graph = graph_bytes(width, batch_tokens, value_bytes, on_gpu)
    return VALUE_BYTES * sum(values) + ROUNDING_BYTES * max(values, default=0) + graph


# What libraries and the allocator take on first use whatever the model: measured 20 to 50 MB on a CPU.
RESERVE_BYTES = 64 << 20


def step_bytes(unit_bytes: int, width: int, value_bytes: int, tokens: int, adapter_bytes: int, on_gpu: bool) -> int:
    """What a step on `tokens` at once holds beside the unit that computes, at most.

    The unit that is read ahead, the head's slices and their gradients, the adapter with its optimizer, and the graph of
    one unit, of which the widest makes `width` values of a token. Kept unit inputs are not in it: they lie on the host
    and are reported by themselves.
    """
    return unit_bytes + 4 * SLICE_BYTES + adapter_bytes + graph_bytes(width, tokens, value_bytes, on_gpu)


# A linear that holds less than this share of its block's linear weights stays dense: a router or a gate saves nothing
# and decides much.
SMALL_SHARE = 0.005
# Rows of one expert that are computed at a time when its moments are taken.
EXPERT_ROWS = 1024
# A matrix that stays on disk is applied by slices of this size, so that it costs as much whatever the vocabulary.
SLICE_BYTES = 64 << 20
EXPERTS_PER_TOKEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "experts_per_token")


def routed_width(experts_per_token: int, opened: int, inner: int, hidden: int) -> int:
    """What experts read and give of one token, once for each that it is sent to.

    The first matrix takes `hidden` features to `opened` ones, the second takes the `inner` that are left of these back.
    """
    return experts_per_token * (opened + inner + 2 * hidden)


def graph_bytes(width: int, tokens: int, value_bytes: int, on_gpu: bool) -> int:
    """What the graph of one unit takes on a batch, at most; on a host with the holes that it leaves in the heap.

    `width` are inputs and outputs of all matrices of the unit for a token, of experts `routed_width`: as much again for
    norms, activations and residual sums. On a host as much as all that for the holes between tensors below 32 MB, which
    glibc's heap gives back only when asked; asking at every step would take a third longer (manifests/LOG.md).
    """
    return (2 if on_gpu else 4) * tokens * width * max(4, value_bytes)
