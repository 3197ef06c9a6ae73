"""Gathers what each expert of a mixture reads while its unit runs; then computes moments of one expert at a time.

All experts of a module read rows of the same tensor, so that tensor is kept: the hidden states (N, H) of each call and
the experts of each token, parked like all hidden states (in host memory up to a budget, else in mapped files). Moments
for all experts at once would be larger than their layer: 128 moments of 1536 x 1536 in float64 take 2.4 GB, the layer
1.2 GB. Letters as in `models/experts.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from onelayer.compiler.compile.solving import Solved, solve_all
from onelayer.compiler.compile.writer import StoredLinear, StoredStack
from onelayer.compiler.emulators.figures import StackFigures
from onelayer.compiler.factors.expectations import Expectations
from onelayer.compiler.factors.moments import NON_FINITE_LIMIT, Moments, dropped_rows
from onelayer.compiler.machine.distributed import Processes
from onelayer.compiler.machine.meter import return_free_memory
from onelayer.compiler.models.experts import ExpertStacks
from onelayer.compiler.models.unit_memory import EXPERT_ROWS
from onelayer.compiler.streaming.spill import SpillPool

T = TypeVar("T")

# At most this many tokens, evenly spaced, represent all tokens of a unit.
POOLED_ROWS = 4096


@dataclass
class ExpertCalls:
    """The calls of one module of experts: its inputs, on the host, and the experts of each token."""

    stacks: ExpertStacks
    spill_pool: SpillPool
    device: torch.device
    product_dtype: torch.dtype
    hidden: list[torch.Tensor] = field(default_factory=list)
    refused: bool = False
    _index: list[torch.Tensor] = field(default_factory=list)
    _tokens: list[torch.Tensor] = field(default_factory=list)

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep one call, unless the module does not do what the interface says."""
        if self.refused:
            return
        routed = self.stacks.routed(args, kwargs)
        if routed is None or (not self.hidden and not self.stacks.acts_as_declared(routed, output)):
            self.refused = True
            self.hidden.clear()
            self._index.clear()
            return
        # A copy: the model may change the tensor in place, and spilling gives it another storage.
        kept = routed[0].detach().to("cpu", copy=True).contiguous()
        spilled_bytes = self.spill_pool.spilled_bytes
        self.spill_pool.hold(kept)
        if self.spill_pool.spilled_bytes > spilled_bytes:
            return_free_memory()  # otherwise each spilled copy leaves a hole in the heap
        self.hidden.append(kept)
        self._index.append(routed[1].to("cpu", copy=True))

    def gather(self, team: Processes) -> None:
        """Give process 0, which compresses the experts, the calls of all processes; the others keep none."""
        if team.is_alone:
            return
        self.refused = team.any(self.refused)
        parts = team.gather_in_first((self.hidden, self._index))
        self.hidden = [] if self.refused else [kept for hidden, _ in parts for kept in hidden]
        self._index = [] if self.refused else [index for _, indices in parts for index in indices]
        self.spill_pool.hold(self.hidden)

    @property
    def reason(self) -> str | None:
        """Why the stacks have no moments; None if they have."""
        if self.refused:
            return "its forward is not that of transformers' experts interface"
        return None if self.hidden else "never called"

    def sort(self) -> list[int]:
        """Sort the tokens by expert after all calls; return how many rows each expert reads."""
        count = self.stacks.shape(self.stacks.opening)[0]
        index_TK = torch.cat(self._index)
        order = index_TK.reshape(-1).argsort(stable=True) // index_TK.shape[1]
        rows: list[int] = torch.bincount(index_TK.reshape(-1), minlength=count).tolist()
        # Numbers above the last expert mean that a token is sent to none; they sort last.
        self._tokens = list(order.split(rows)[:count])
        return rows[:count]

    def moments(self, expert: int) -> dict[str, Moments]:
        """Return the moments of one expert by stack, over the rows that were sent to it."""
        return self._moments(expert, self.tokens(expert))

    def tokens(self, expert: int) -> torch.Tensor:
        """Return the ascending numbers of the tokens that were sent to an expert."""
        return self._tokens[expert]

    def pool(self) -> torch.Tensor:
        """Return the numbers of all tokens of the unit, or of `POOLED_ROWS` of them."""
        total = sum(len(part) for part in self.hidden)
        return torch.linspace(0, total - 1, min(total, POOLED_ROWS)).round().long()

    def pooled(self, expert: int) -> dict[str, Moments]:
        """Return the moments of one expert by stack over the pool of tokens."""
        return self._moments(expert, self.pool())

    def _moments(self, expert: int, tokens: torch.Tensor) -> dict[str, Moments]:
        moments = {leaf: self._empty(leaf) for leaf in self.stacks.leaves}
        opening, closing = self.stacks.leaves
        for x_SH in self.rows(tokens):
            opened_SO = self.stacks.product(opening, expert, x_SH)
            inner_SI = self.stacks.opened(expert, opened_SO)
            moments[opening].add(x_SH, opened_SO)
            last = moments[closing]
            last.add(inner_SI, None if last.of_input else self.stacks.product(closing, expert, inner_SI))
        return moments

    def _empty(self, leaf: str) -> Moments:
        """Return an empty moment of the narrow side."""
        _, out_features, in_features = self.stacks.shape(leaf)
        of_input = out_features >= in_features
        return Moments.empty((out_features, in_features), of_input, self.device, self.product_dtype)

    def rows(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the hidden states of ascending token numbers over all calls, `EXPERT_ROWS` at a time."""
        starts = torch.tensor([0, *(len(part) for part in self.hidden)]).cumsum(0)
        for piece in tokens.split(EXPERT_ROWS):
            bounds = torch.searchsorted(piece, starts)
            rows = [
                part[piece[first:last] - start]
                for part, start, first, last in zip(self.hidden, starts, bounds, bounds[1:], strict=False)
                if first < last
            ]
            if rows:
                yield torch.cat(rows).to(self.device)


@contextmanager
def hooks_on(calls: list[ExpertCalls]) -> Iterator[None]:
    """Register the hooks of all calls; remove them on exit."""
    handles = [item.stacks.module.register_forward_hook(item.hook, with_kwargs=True) for item in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# (name, weight (out, in), its moments, rank, expectations, moments for directions that these leave open) -> its form.
Compress = Callable[[str, torch.Tensor, Moments, int | None, Expectations, Callable[[], Moments]], Solved]
# A stack of a module of experts by its last name, and the number of an expert.
Place = tuple[str, int]


def compress_stacks(
    calls: ExpertCalls, ranks: Mapping[str, int | None], compress: Compress
) -> Iterator[tuple[str, StoredStack]]:
    """Yield each stack that `ranks` names, with all of its experts compressed.

    An expert that received too few tokens to determine its factors gets the remaining directions from all tokens.
    Raises `RuntimeError` naming the experts if too many rows are not finite.
    """
    stacks, rows, moments_of = calls.stacks, calls.sort(), OneAtATime(calls.moments)
    dropped: dict[Place, torch.Tensor] = {}

    def solve(place: Place, expected: Expectations) -> Solved:
        leaf, expert = place
        moments = moments_of(expert)[leaf]
        dropped[place] = moments.gram.dropped
        name, weight, rank = f"{stacks.path(leaf)}[{expert}]", stacks.weight(leaf, expert), ranks[stacks.path(leaf)]
        return compress(name, weight, moments, rank, expected, lambda: calls.pooled(expert)[leaf])

    places = places_of(stacks, ranks, len(rows))
    starved = {(leaf, expert) for leaf, expert in places if rows[expert] < (ranks[stacks.path(leaf)] or 0)}
    stored = solve_all(places, solve, calls.device, starved)
    check_finite(stacks, dropped, rows)
    yield from stacked(stacks, stored, rows)


class OneAtATime(Generic[T]):
    """Something made for each expert in turn; only the last expert's is held."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._last: tuple[int, T] | None = None

    def __call__(self, expert: int) -> T:
        """Return what is made for an expert."""
        if self._last is None or self._last[0] != expert:
            self._last = None  # freed before the next is made
            self._last = (expert, self._make(expert))
        return self._last[1]


def places_of(stacks: ExpertStacks, ranks: Mapping[str, int | None], experts: int) -> list[Place]:
    """List the experts of every stack that `ranks` names, all stacks of an expert together."""
    leaves = [leaf for leaf in stacks.leaves if stacks.path(leaf) in ranks]
    return [(leaf, expert) for expert in range(experts) for leaf in leaves]


def stacked(
    stacks: ExpertStacks, stored: dict[Place, StoredLinear], rows: list[int]
) -> Iterator[tuple[str, StoredStack]]:
    """Yield each stack, put together from its experts, which are taken out; `rows` counts what each expert read."""
    for leaf in dict.fromkeys(leaf for leaf, _ in stored):
        compressed = [stored.pop((leaf, expert)) for expert in range(len(rows))]
        figures = StackFigures.over(stacks.path(leaf), stacks.shape(leaf), [item.figures for item in compressed], rows)
        tensors = {
            ending: torch.stack([item.tensors[ending] for item in compressed]) for ending in compressed[0].tensors
        }
        compressed.clear()
        yield stacks.path(leaf), StoredStack(figures, tensors)


def check_finite(stacks: ExpertStacks, dropped: Mapping[Place, torch.Tensor], rows: Sequence[int]) -> None:
    """Raise `RuntimeError` naming a stack if too many of the rows that it read are not finite; the host waits once."""
    totals: defaultdict[str, int] = defaultdict(int)
    for (leaf, _), count in zip(dropped, dropped_rows(list(dropped.values())), strict=True):
        totals[leaf] += count
    for leaf, total in totals.items():
        if total > NON_FINITE_LIMIT * sum(rows):
            raise RuntimeError(
                f"{stacks.path(leaf)}: {total} of {sum(rows)} calibration rows are not finite, more than "
                f"{NON_FINITE_LIMIT:.0%}; check the checkpoint's dtype and the data"
            )
