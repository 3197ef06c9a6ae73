"""Turns a keep-ratio (rho in papers) into a rank per linear: from the same ratio for all, or by their spectra."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import TYPE_CHECKING, Any, Literal

from onelayer.compiler.factors.stored_forms import FactorDtype, row_bytes

if TYPE_CHECKING:
    import numpy as np

Allocation = Literal["uniform", "spectrum"]
Solver = Literal["exact", "fast"]
# With ranks by spectrum, factors are first written this many times longer than uniform ones, then sliced.
SPECTRUM_HEADROOM = 2.5


def widest_ratio(ratio: float, allocation: Allocation) -> float:
    """Return the keep-ratio at which factors are computed."""
    return ratio if allocation == "uniform" or ratio == 1 else min(0.999, SPECTRUM_HEADROOM * ratio)


def copies_on_disk(allocation: Allocation, quantized: bool) -> int:
    """Count the emulators that are on the disk at once.

    With ranks by spectrum these are the wide one, the quantized weights next to its factors, and its slice.
    """
    return 1 if allocation == "uniform" else 3 if quantized else 2


def rank_for(ratio: float, out_features: int, in_features: int) -> int | None:
    """Return the rank whose factors hold `ratio` of a linear's weights, at least 1; None if the linear stays dense.

    k = floor(ratio * in * out / (in + out)), so that k * (in + out) weights replace in * out.
    """
    if ratio >= 1:
        return None
    rank = max(1, int(ratio * in_features * out_features / (in_features + out_features)))
    return None if rank * (in_features + out_features) >= in_features * out_features else rank


@dataclass(frozen=True)
class Spectrum:
    """A linear's shape, the leading singular values of its output and the energy of all of them: they decide its rank.

    If factors are quantized, `prefix_errors` are their errors by rank and `dense_error` is the error of the whole
    weight: such a linear may also stay whole. Prices are then bytes in `factor_dtype`, otherwise numbers of weights.
    """

    out_features: int
    in_features: int
    singular_values: Sequence[float]
    energy: float
    prefix_errors: Sequence[float] | None = None
    dense_error: float | None = None
    factor_dtype: FactorDtype | None = None

    @property
    def price(self) -> int:
        """The price of a direction."""
        return self._row_price(self.out_features) + self._row_price(self.in_features)

    @property
    def whole_price(self) -> int:
        """The price of the whole matrix."""
        return self.out_features * self._row_price(self.in_features)

    def _row_price(self, width: int) -> int:
        return width if self.factor_dtype is None else row_bytes(width, self.factor_dtype)


def ranks_by_spectrum(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int]:
    """Choose the ranks that cost as much as a uniform `ratio` and lower the summed squared relative error most.

    Direction k of a linear takes s_k^2 / energy off the sum, and all directions of a linear cost the same. Gains fall
    with k, so taking the best directions of all linears until the budget is spent is optimal, and each linear gets a
    prefix of at least 1.
    """
    return _spend(spectra, _budget(spectra, ratio))


def allocate_by_spectrum(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int | None]:
    """Do the same, and also allow quantized whole weights: None for linears whose bytes are worth more that way."""
    budget = _budget(spectra, ratio)
    whole = _whole(spectra, budget)
    budget -= sum(spectra[name].whole_price for name in whole)
    factored = _spend({name: item for name, item in spectra.items() if name not in whole}, budget)
    return {name: factored.get(name) for name in spectra}


def _budget(spectra: Mapping[str, Spectrum], ratio: float) -> int:
    """Compute the cost of a uniform `ratio`."""
    total = 0
    for item in spectra.values():
        uniform = rank_for(ratio, item.out_features, item.in_features)
        total += item.whole_price if uniform is None else uniform * item.price
    return total


def _spend(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """Buy one direction for each linear, then the best of all until the budget is spent."""
    budget -= sum(item.price for item in spectra.values())
    ranks = dict.fromkeys(spectra, 1)
    for _, name in merge(*(_gains(name, item) for name, item in spectra.items())):
        if spectra[name].price > budget:
            break
        budget -= spectra[name].price
        ranks[name] += 1
    return ranks


def _whole(spectra: Mapping[str, Spectrum], budget: int) -> set[str]:
    """Choose the linears that stay whole: those for which that is best at the lowest rate that keeps the budget.

    A rate is an error per price. At a given rate, each linear takes the choice with the lowest sum of squared error and
    rate times price. Bisection finds the rate. The rest of the budget goes to the ranks of the other linears.
    """
    if all(item.dense_error is None for item in spectra.values()):
        return set()
    import numpy as np

    choices = {name: _choices(item) for name, item in spectra.items()}
    chosen: set[str] = set()
    low, high = -60.0, 10.0  # powers of two; errors lie between 0 and 1 and prices are at least 1
    for _ in range(60):
        middle = (low + high) / 2
        best = {name: int(np.argmin(errors + 2.0**middle * prices)) for name, (prices, errors) in choices.items()}
        if sum(choices[name][0][index] for name, index in best.items()) <= budget:
            # The whole weight is the last choice of a linear that has it.
            chosen = {name for name, index in best.items() if index == len(spectra[name].singular_values)}
            high = middle
        else:
            low = middle
    return chosen


def _choices(item: Spectrum) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Compute price and squared relative error of a linear at every rank, then of the whole weight if it was tried."""
    import numpy as np

    values = np.asarray(item.singular_values, dtype=np.float64)
    prices = item.price * np.arange(1, len(values) + 1)
    if item.prefix_errors is None:
        errors = np.maximum(0.0, 1 - np.cumsum(values**2) / (item.energy or 1.0))
    else:
        errors = np.asarray(item.prefix_errors, dtype=np.float64) ** 2
    if item.dense_error is None:
        return prices, errors
    return np.append(prices, item.whole_price), np.append(errors, item.dense_error**2)


def _gains(name: str, item: Spectrum) -> list[tuple[float, str]]:
    """Compute the gain per price of each direction after the first, negated so that the best sorts first."""
    price = item.price * (item.energy or 1.0)
    return [(-value * value / price, name) for value in item.singular_values[1:]]
