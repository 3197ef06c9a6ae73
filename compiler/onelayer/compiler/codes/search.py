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


def best_windows(
    left: torch.Tensor,
    feedback: torch.Tensor,
    codebook: torch.Tensor,
    bits: int,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the windows (O, C / d) that stand for `left` (O, C), in units of the scale, which takes up the errors.

    `feedback` (C, C) is the upper Cholesky factor of the inverse of the moments of the columns. `before` (O) are the
    windows to the left of the first, if there are any.
    """
    blocks = feedback.unflatten(0, (-1, codebook.shape[1])).unflatten(2, (-1, codebook.shape[1]))
    # A triangle whose diagonal is positive has an inverse, so nobody looks whether these failed.
    inverses = torch.linalg.inv_ex(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)).inverse
    search = partial(_Search, feedback=feedback, inverses=inverses, choices=codebook @ inverses, bits=bits)
    rows = rows_at_once(bits)
    starts = [None] * -(-len(left) // rows) if before is None else before.split(rows)
    return torch.cat([search(part).windows(start) for part, start in zip(left.split(rows), starts, strict=True)])


@dataclass(frozen=True)
class _Block:
    """The paths of some columns: their windows (O, S, codes) and errors (O, S, columns)."""

    start: int
    stop: int
    windows: torch.Tensor
    errors: torch.Tensor


class _Search:
    """A search over some rows. Distances of code n are measured times `inverses[n]`; `choices[n]` is the codebook so.

    That is the metric of what the columns to the right cannot make up for.
    """

    def __init__(
        self, left: torch.Tensor, feedback: torch.Tensor, inverses: torch.Tensor, choices: torch.Tensor, bits: int
    ) -> None:
        self.left, self.feedback, self.inverses, self.choices, self.bits = left, feedback, inverses, choices, bits
        self.rows, self.width, device = len(left), choices.shape[2], left.device
        self.following = 1 << bits
        self.states = CODEBOOK_ROWS // self.following
        self.numbers = torch.arange(self.states, device=device)
        self.offsets = torch.arange(self.rows, device=device)[:, None] * self.states
        self.found = torch.empty(self.rows, left.shape[1] // self.width, dtype=torch.uint8, device=device)

    def windows(self, began: torch.Tensor | None) -> torch.Tensor:
        """Search block by block; each decides the one before. The first begins with the last bits of windows (O)."""
        columns, step = self.left.shape[1], self.width * max(1, LAZY_COLUMNS // self.width)
        costs = self.left.new_zeros(self.rows, self.states)
        if began is not None:
            costs = torch.where(self.numbers == began[:, None] % self.states, costs, torch.inf)
        before: _Block | None = None
        for start in range(0, columns, step):
            block, costs, roots = self._block(start, min(start + step, columns), before, costs)
            if before is not None:
                root = roots.gather(1, costs.argmin(dim=1, keepdim=True))
                self._decide(before, root[:, 0], block.stop)
                # Paths from another start are given up: what they need is decided otherwise now.
                costs = torch.where(roots == root, costs, torch.inf)
            costs = costs - costs.amin(dim=1, keepdim=True)
            before = block
        if before is not None:
            self._decide(before, costs.argmin(dim=1), columns)
        return self.found

    def _decide(self, block: _Block, chosen: torch.Tensor, taken: int) -> None:
        """Take one path (O,) of a block; columns from `taken` on take up its errors."""
        every = torch.arange(self.rows, device=chosen.device)
        self.found[:, block.start // self.width : block.stop // self.width] = block.windows[every, chosen]
        self.left[:, taken:] -= block.errors[every, chosen] @ self.feedback[block.start : block.stop, taken:]

    def _block(
        self, start: int, stop: int, before: _Block | None, costs: torch.Tensor
    ) -> tuple[_Block, torch.Tensor, torch.Tensor]:
        """Extend all paths by some columns; return them, what they cost, and the states (O, S) that they come from."""
        wanted = self.left[:, None, start:stop].expand(-1, self.states, -1).flatten(0, 1)  # (O S, columns)
        if before is not None:
            handed_on = self.feedback[before.start : before.stop, start:stop]
            wanted = wanted.addmm(before.errors.flatten(0, 1), handed_on, alpha=-1)
        near = self.feedback[start:stop, start:stop]
        steps = []
        for first in range(0, stop - start, self.width):
            last, number = first + self.width, (start + first) // self.width
            points, choices = wanted[:, : self.width] @ self.inverses[number], self.choices[number]
            costs, chosen = self._cheapest(points, choices, costs)
            parents = self._parents(chosen)
            errors = points.index_select(0, parents) - choices.index_select(0, chosen.flatten())
            steps.append((chosen.to(torch.uint8), errors))
            if last < stop - start:
                wanted = wanted[:, self.width :].index_select(0, parents)
                wanted.addmm_(errors, near[first:last, last:], alpha=-1)
        return self._traced(start, stop, steps, costs)

    def _parents(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the places (O S) of the paths that windows (O, S) continue."""
        return (self.offsets + (chosen >> self.bits)).flatten()

    def _cheapest(
        self, points: torch.Tensor, choices: torch.Tensor, costs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the costs (O, S) of the best path to every state, and its window, from `points` (O S, d)."""
        shape = self.rows, self.states, 1
        reached = (costs.flatten() + points.square().sum(dim=1)).view(shape)
        reached = reached + choices.square().sum(dim=1).view(self.states, self.following)
        for entry in range(self.width):
            values = choices[:, entry].view(self.states, self.following)
            reached.addcmul_(points[:, entry].view(shape), values, value=-2)
        # A window is a state and the code that continues it; its last bits are the state that it leads to.
        costs, leading = reached.view(self.rows, self.following, self.states).min(dim=1)
        return costs, leading * self.states + self.numbers

    def _traced(
        self, start: int, stop: int, steps: list[tuple[torch.Tensor, torch.Tensor]], costs: torch.Tensor
    ) -> tuple[_Block, torch.Tensor, torch.Tensor]:
        """Follow the best path of every state back to where the block begins."""
        shape = self.rows, self.states
        windows = torch.empty(*shape, len(steps), dtype=torch.uint8, device=costs.device)
        errors = costs.new_empty(*shape, len(steps), self.width)
        places = (self.offsets + self.numbers).flatten()
        for number in range(len(steps) - 1, -1, -1):
            chosen, error = steps[number]
            windows[:, :, number] = chosen.flatten().index_select(0, places).view(shape)
            errors[:, :, number] = error.index_select(0, places).view(*shape, self.width)
            places = self._parents(chosen).index_select(0, places)
        return _Block(start, stop, windows, errors.flatten(2)), costs, places.view(shape) - self.offsets
