"""Makes float64 sums independent of the order and grouping of their terms, so that several processes get one's result.

Terms are rounded to multiples of one small power of two before they are added. Such sums are exact in float64 (the
pre-rounding of Demmel and Nguyen, "Fast reproducible floating-point summation", 2013). The first term of all decides
the power.
"""

from collections.abc import Mapping

import torch

from onelayer.compiler.machine.distributed import Processes

# How many times as large as the first term the mean term may be before sums are rounded again.
HEADROOM = 16.0


class SumGrid:
    """The rounding of the terms of one sum. `terms` is how many are expected.

    With `waits`, another process has the first term: the first term here is added as it is, and `settle` rounds it.
    """

    def __init__(self, terms: int = 1, waits: bool = False) -> None:
        self.base: torch.Tensor | None = (
            None  # a float64 number: adding it to a term cuts off the digits below the grid
        )
        self._terms, self._waits = terms, waits

    def rounded(self, term: torch.Tensor) -> torch.Tensor:
        """Return a term in float64, rounded to the grid. The host does not wait for a device."""
        if self.base is None and not self._waits:
            largest = term.detach().abs().max().to(torch.float64)
            exponent = (largest * (HEADROOM * self._terms)).log2().ceil()
            # Zeros and values that are not finite decide nothing: they get a grid that changes nothing.
            self.base = 1.5 * exponent.nan_to_num(-900.0, -900.0, -900.0).clamp(-900.0, 900.0).exp2()
        wide = term.to(torch.float64)  # a number that is one value does not widen a sum by itself
        return wide if self.base is None else (wide + self.base).sub_(self.base)

    def settle(self, base: float, total: torch.Tensor) -> torch.Tensor:
        """Take the grid of the process that has the first term; return the present total on it."""
        if self.base is not None:
            return total
        self.base = torch.tensor(base, dtype=torch.float64, device=total.device)
        return self.rounded(total)


def settled(
    grids: Mapping[str, SumGrid], totals: Mapping[str, torch.Tensor], team: Processes
) -> dict[str, torch.Tensor]:
    """Let every process take the grids of process 0, by name; return its totals on them. The host waits once."""
    bases = team.by_first(lambda: _bases(grids))
    return {name: grids[name].settle(bases[name], total) if name in bases else total for name, total in totals.items()}


def _bases(grids: Mapping[str, SumGrid]) -> dict[str, float]:
    known = {name: grid.base for name, grid in grids.items() if grid.base is not None}
    return dict(zip(known, torch.stack(list(known.values())).tolist(), strict=True)) if known else {}
