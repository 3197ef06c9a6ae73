"""Codes the experts of a mixture: the moments of what each of them reads, gathered after all calls.

Letters as in `models/experts.py`.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from onelayer.compiler.codes.moments import BlockGram
from onelayer.compiler.compile.expert_factors import ExpertCalls, check_finite, on_host, stacked
from onelayer.compiler.compile.writer import StoredLinear, StoredStack

# What the figures say of an expert whose own rows are fewer than its inputs.
COMPLETED = "completed by rows of other experts"
# (name, weight (out, in), moments of its inputs, rank) -> what is stored.
Code = Callable[[str, torch.Tensor, BlockGram, int | None], StoredLinear]


def code_stacks(calls: ExpertCalls, ranks: Mapping[str, int | None], code: Code) -> Iterator[tuple[str, StoredStack]]:
    """Yield each stack that `ranks` names, with all of its experts coded.

    An expert that reads fewer rows than it has inputs is weighted by rows of all tokens too, as many as it lacks.
    Raises `RuntimeError` naming the experts if too many rows are not finite.
    """
    stacks = calls.stacks
    rows = calls.sort()
    stored: dict[str, list[StoredLinear]] = {leaf: [] for leaf in stacks.leaves if stacks.path(leaf) in ranks}
    dropped = dict.fromkeys(stored, 0)
    for expert, count in enumerate(rows):
        own = _inputs(calls, expert, calls.tokens(expert))
        features = max(own[leaf].features for leaf in stored)
        pooled = _inputs(calls, expert, calls.pool()) if count < features else None
        for leaf, coded in stored.items():
            dropped[leaf] += own[leaf].dropped_rows
            check_finite(stacks.path(leaf), dropped[leaf], sum(rows))
            weight, moments = stacks.weight(leaf, expert).to(torch.float32), own[leaf]
            lacking = moments.features - moments.rows
            if pooled is not None and lacking > 0:
                moments.blocks += lacking / max(1, pooled[leaf].rows) * pooled[leaf].blocks
                moments.rows += lacking
            item = on_host(code(f"{stacks.path(leaf)}[{expert}]", weight, moments, ranks[stacks.path(leaf)]))
            if lacking > 0:
                item = StoredLinear(item.figures.model_copy(update={"fallback": COMPLETED}), item.tensors)
            coded.append(item)
    yield from stacked(stacks, stored, rows)


def _inputs(calls: ExpertCalls, expert: int, tokens: torch.Tensor) -> dict[str, BlockGram]:
    """Return the moments of the inputs of an expert by stack, over the given tokens."""
    stacks, (opening, closing) = calls.stacks, calls.stacks.leaves
    moments = {leaf: BlockGram(stacks.shape(leaf)[2], calls.device) for leaf in stacks.leaves}
    for x_SH in calls.rows(tokens):
        moments[opening].add(x_SH)
        moments[closing].add(stacks.opened(expert, stacks.product(opening, expert, x_SH)))
    return moments
