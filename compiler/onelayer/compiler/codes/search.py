"""The search for codes whose windows overlap: the best path through a trellis, with feedback for every path. Pure.

A state is what the next window begins with, the last bits of the one before; so few states have few paths. As in the
algorithm of Viterbi, the best path to every state is kept while columns are coded in order. Each of these paths has
made other errors, so the columns to the right make up for those of each by itself (per-survivor processing, Raheli,
Polydoros and Tzou 1995). With windows of one code there is one state: each code is the nearest at its turn.
Shape letters: O outputs, C columns, d code width, S states, K codes that continue a state.
"""

from dataclasses import dataclass
from functools import partial

import torch

from onelayer.compiler.codes.forms import CODEBOOK_ROWS, LAZY_COLUMNS, rows_at_once
from onelayer.compiler.codes.windows import looked_up

# What a path costs that may not be taken: more than any other, and finite.
GIVEN_UP = 1e30


def best_windows(
    left: torch.Tensor,
    feedback: torch.Tensor,
    codebook: torch.Tensor,
    bits: int,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the windows (O, C / d) that stand for `left` (O, C), in units of the scale.

    `feedback` (C, C) is the upper Cholesky factor of the inverse of the moments of the columns. `before` (O) are the
    windows to the left of the first, if there are any.
    """
    blocks = feedback.unflatten(0, (-1, codebook.shape[1])).unflatten(2, (-1, codebook.shape[1]))
    # A triangle whose diagonal is positive has an inverse, so nobody looks whether these failed.
    inverses = torch.linalg.inv_ex(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)).inverse
    search = partial(_Search, feedback=_times(feedback, inverses), choices=codebook @ inverses, bits=bits)
    rows = rows_at_once(bits)
    starts = [None] * -(-len(left) // rows) if before is None else before.split(rows)
    parts = zip(left.split(rows), starts, strict=True)
    return torch.cat([search(_times(part, inverses)).windows(start) for part, start in parts])


def _times(M: torch.Tensor, inverses: torch.Tensor) -> torch.Tensor:
    """Multiply the columns of each code by its inverse: in these units, an error's square is what it costs."""
    by_code = M.unflatten(1, (len(inverses), -1)).transpose(0, 1)
    return torch.bmm(by_code, inverses).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class _Block:
    """The paths of some columns: their windows (S, O, codes) and errors (S, O, columns)."""

    start: int
    stop: int
    windows: torch.Tensor
    errors: torch.Tensor


class _Search:
    """A search over some rows, in units in which an error's square is what columns to the right cannot make up for.

    `choices[n]` is the codebook in the units of code n. `left` takes up the errors.
    """

    def __init__(self, left: torch.Tensor, feedback: torch.Tensor, choices: torch.Tensor, bits: int) -> None:
        self.left, self.feedback, self.choices, self.bits = left, feedback, choices, bits
        self.rows, self.width, device = len(left), choices.shape[2], left.device
        self.following = 1 << bits
        self.states = CODEBOOK_ROWS // self.following
        self.every = torch.arange(self.rows, device=device)
        self.numbers = torch.arange(self.states, device=device)[:, None]
        # A window is a state and the code that continues it. Its last bits are the state that it leads to.
        windows = torch.arange(CODEBOOK_ROWS, dtype=torch.int32, device=device)
        self.leading = (windows // self.states).view(self.states, self.following, 1)
        lengths = choices.square().sum(dim=2, keepdim=True)
        terms = torch.cat([-2 * choices, lengths, torch.ones_like(lengths)], dim=2)
        self.terms = terms.view(-1, self.states, self.following, self.width + 2)
        self.found = torch.empty(self.rows, left.shape[1] // self.width, dtype=torch.uint8, device=device)

    def windows(self, began: torch.Tensor | None) -> torch.Tensor:
        """Search block by block; each decides the one before. The first begins with the last bits of windows (O)."""
        columns, step = self.left.shape[1], self.width * max(1, LAZY_COLUMNS // self.width)
        costs = self.left.new_zeros(self.states, self.rows)
        if began is not None:
            costs.masked_fill_(self.numbers != began % self.states, GIVEN_UP)
        before: _Block | None = None
        for start in range(0, columns, step):
            block, costs, roots = self._block(start, min(start + step, columns), before, costs)
            if before is not None:
                root = roots.gather(0, costs.argmin(dim=0, keepdim=True))
                self._decide(before, root[0], block.stop)
                # Paths from another start are given up: what they need is decided otherwise now.
                costs = costs.masked_fill(roots != root, GIVEN_UP)
            costs = costs - costs.amin(dim=0)
            before = block
        if before is not None:
            self._decide(before, costs.argmin(dim=0), columns)
        return self.found

    def _decide(self, block: _Block, chosen: torch.Tensor, taken: int) -> None:
        """Take one path (O,) of a block; columns from `taken` on take up its errors."""
        self.found[:, block.start // self.width : block.stop // self.width] = block.windows[chosen, self.every]
        self.left[:, taken:] -= block.errors[chosen, self.every] @ self.feedback[block.start : block.stop, taken:]

    def _block(
        self, start: int, stop: int, before: _Block | None, costs: torch.Tensor
    ) -> tuple[_Block, torch.Tensor, torch.Tensor]:
        """Extend all paths by some columns; return them, what they cost, and the states (S, O) that they come from."""
        wanted = self.left[:, start:stop].expand(self.states, -1, -1).flatten(0, 1)  # (S O, columns)
        if before is not None:
            handed_on = self.feedback[before.start : before.stop, start:stop]
            wanted = wanted.addmm(before.errors.flatten(0, 1), handed_on, alpha=-1)
        near = self.feedback[start:stop, start:stop]
        steps = []
        for first in range(0, stop - start, self.width):
            last, number = first + self.width, (start + first) // self.width
            costs, chosen = self._cheapest(wanted[:, : self.width], self.terms[number], costs)
            wanted = wanted.index_select(0, self._parents(chosen))
            errors = wanted[:, : self.width] - looked_up(chosen.flatten(), self.choices[number])
            steps.append((chosen.to(torch.uint8), errors))
            wanted = wanted[:, self.width :].addmm_(errors, near[first:last, last:], alpha=-1)
        windows, errors, roots = self._traced(steps)
        return _Block(start, stop, windows, errors), costs, roots

    def _parents(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the places (S O) of the paths that windows (S, O) continue."""
        return ((chosen >> self.bits).int() * self.rows + self.every).flatten()

    def _cheapest(
        self, points: torch.Tensor, terms: torch.Tensor, costs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the costs (S, O) of the best path to every state, and its window, from `points` (S O, d).

        Costs are no less than 0, so their bits compare as they do. The last bits, as many as a code has, hold what
        leads to the state, so that one pass finds both: costs are exact to 2 ** -16 or better.
        """
        lengths = costs.flatten()
        for entry in points.unbind(1):
            lengths = lengths.addcmul(entry, entry)
        factors = torch.cat([points.T, torch.ones_like(lengths)[None], lengths[None]]).unflatten(1, (self.states, -1))
        reached = torch.bmm(terms, factors.transpose(0, 1)).clamp_min_(0.0).view(torch.int32)  # (S, K, O)
        reached.bitwise_and_(-self.following).bitwise_or_(self.leading)
        if self.states > self.following:
            best = reached.unflatten(0, (self.following, -1)).amin(dim=0).flatten(0, 1)
        else:
            best = reached.amin(dim=0).unflatten(0, (-1, self.states)).amin(dim=0)
        leading = best & (self.following - 1)
        return (best - leading).view(torch.float32), leading.long() * self.states + self.numbers

    def _traced(self, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Follow the best path of every state back: its windows and errors, as in `_Block`, and where it began."""
        shape = self.states, self.rows
        windows, errors = list[torch.Tensor](), list[torch.Tensor]()
        places = (self.numbers * self.rows + self.every).flatten()
        for chosen, error in reversed(steps):
            windows.append(chosen.flatten().index_select(0, places))
            errors.append(error.index_select(0, places))
            places = self._parents(chosen).index_select(0, places)
        found = torch.stack(windows[::-1], dim=1).view(*shape, -1), torch.cat(errors[::-1], dim=1).view(*shape, -1)
        return *found, places.view(shape) // self.rows
