"""The calls of one module of experts in, its stacks as they will be stored out: each expert on its own, then stacked.

Held: the moments of one expert, and the factors of all on the host.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from onelayer.compiler.emulator import StoredLinear, StoredStack
from onelayer.compiler.expert_moments import ExpertCalls
from onelayer.compiler.linear_figures import StackFigures
from onelayer.compiler.moments import NON_FINITE_LIMIT, Moments

# (name, weight (out, in), its moments, rank, what stands in where these determine too little) -> what is stored.
Compress = Callable[[str, torch.Tensor, Moments, int | None, Callable[[], Moments]], StoredLinear]


def compress_stacks(
    calls: ExpertCalls, ranks: Mapping[str, int | None], compress: Compress
) -> Iterator[tuple[str, StoredStack]]:
    """Each stack that `ranks` names, with all of its experts compressed.

    An expert that was sent too few tokens to determine its factors gets the remaining directions from all tokens, as
    if it had been sent them. Raises `RuntimeError` naming the experts where too many rows are not finite.
    """
    stacks = calls.stacks
    rows = calls.sort()
    stored: dict[str, list[StoredLinear]] = {leaf: [] for leaf in stacks.leaves if stacks.path(leaf) in ranks}
    dropped = dict.fromkeys(stored, 0)
    for expert in range(len(rows)):
        moments = calls.moments(expert)
        for leaf, found in stored.items():
            dropped[leaf] += moments[leaf].gram.dropped_rows
            _check_finite(stacks.path(leaf), dropped[leaf], sum(rows))
            reserve = lambda leaf=leaf, expert=expert: calls.pooled(expert)[leaf]  # noqa: E731
            name, weight = f"{stacks.path(leaf)}[{expert}]", stacks.weight(leaf, expert)
            found.append(_on_host(compress(name, weight, moments[leaf], ranks[stacks.path(leaf)], reserve)))
    for leaf, found in stored.items():
        figures = StackFigures.over(stacks.path(leaf), stacks.shape(leaf), [item.figures for item in found], rows)
        tensors = {ending: torch.stack([item.tensors[ending] for item in found]) for ending in found[0].tensors}
        found.clear()
        yield stacks.path(leaf), StoredStack(figures, tensors)


def _on_host(stored: StoredLinear) -> StoredLinear:
    return StoredLinear(stored.figures, {ending: tensor.cpu() for ending, tensor in stored.tensors.items()})


def _check_finite(name: str, dropped: int, rows: int) -> None:
    if dropped > NON_FINITE_LIMIT * rows:
        raise RuntimeError(
            f"{name}: at least {dropped} of {rows} calibration rows are not finite, more than "
            f"{NON_FINITE_LIMIT:.0%}; check the checkpoint's dtype and the data"
        )
