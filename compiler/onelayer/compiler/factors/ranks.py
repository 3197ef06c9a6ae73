"""A keep-ratio becomes a rank per linear: the same for all, or as the spectra ask (papers call the ratio rho)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import Any, Literal

import numpy as np

from onelayer.compiler.factors.stored_forms import FactorDtype, row_bytes

Allocation = Literal["uniform", "spectrum"]
Solver = Literal["exact", "fast"]
# With ranks by spectrum, factors are first written this many times longer than uniform ones, then cut.
SPECTRUM_HEADROOM = 2.5


def widest_ratio(ratio: float, allocation: Allocation) -> float:
    """The keep-ratio at which factors are computed."""
    return ratio if allocation == "uniform" or ratio == 1 else min(0.999, SPECTRUM_HEADROOM * ratio)


def copies_on_disk(allocation: Allocation, quantized: bool) -> int:
    """How many emulators lie there at once: with ranks by spectrum the wide one, quantized weights next to its factors,
    and the one cut from it."""
    return 1 if allocation == "uniform" else 3 if quantized else 2


def rank_for(ratio: float, out_features: int, in_features: int) -> int | None:
    """The rank whose factors hold `ratio` of a linear's weights, at least 1; None where the linear stays dense.

    k = floor(ratio * in * out / (in + out)), so that k * (in + out) weights replace in * out.
    """
    if ratio >= 1:
        return None
    rank = max(1, int(ratio * in_features * out_features / (in_features + out_features)))
    return None if rank * (in_features + out_features) >= in_features * out_features else rank


@dataclass(frozen=True)
class Spectrum:
    """What decides a linear's rank: its shape, the leading singular values of its output, the energy of all of them.

    `prefix_errors` of its factors by rank and `dense_error` of its whole weight where they are quantized: such a linear
    may also stay whole. `factor_dtype` is what they are packed as; prices are then bytes, else numbers of weights.
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
        """The bytes of one direction."""
        return self._row_price(self.out_features) + self._row_price(self.in_features)

    @property
    def whole_price(self) -> int:
        """The bytes of the whole matrix."""
        return self.out_features * self._row_price(self.in_features)

    def _row_price(self, width: int) -> int:
        return width if self.factor_dtype is None else row_bytes(width, self.factor_dtype)


def ranks_by_spectrum(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int]:
    """Ranks that spend what a uniform `ratio` costs where they lower the summed squared relative error most.

    Direction k of a linear takes s_k^2 / energy off the sum and costs as much as any other of the linear. Gains fall
    with k, so taking the best directions of all linears until the budget is spent is optimal, and each linear gets a
    prefix, at least 1.
    """
    return _spend(spectra, _budget(spectra, ratio))


def allocate_by_spectrum(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int | None]:
    """The same, where a linear may also be quantized whole: None for those whose bytes are worth more so."""
    budget = _budget(spectra, ratio)
    whole = _whole(spectra, budget)
    budget -= sum(spectra[name].whole_price for name in whole)
    factored = _spend({name: item for name, item in spectra.items() if name not in whole}, budget)
    return {name: factored.get(name) for name in spectra}


def _budget(spectra: Mapping[str, Spectrum], ratio: float) -> int:
    """What a uniform `ratio` costs."""
    total = 0
    for item in spectra.values():
        uniform = rank_for(ratio, item.out_features, item.in_features)
        total += item.whole_price if uniform is None else uniform * item.price
    return total


def _spend(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """One direction for each linear, then the best of all while the budget lasts."""
    budget -= sum(item.price for item in spectra.values())
    ranks = dict.fromkeys(spectra, 1)
    for _, name in merge(*(_gains(name, item) for name, item in spectra.items())):
        if spectra[name].price > budget:
            break
        budget -= spectra[name].price
        ranks[name] += 1
    return ranks


def _whole(spectra: Mapping[str, Spectrum], budget: int) -> set[str]:
    """The linears that stay whole: those for which that is best at the lowest error per price that keeps the budget.

    At such a rate, each linear alone takes what costs least: its squared error plus the rate times its price. The rate
    is found by bisection; what the chosen ones leave of the budget goes to the ranks of the others.
    """
    if all(item.dense_error is None for item in spectra.values()):
        return set()
    choices = {name: _choices(item) for name, item in spectra.items()}
    chosen: set[str] = set()
    low, high = -60.0, 10.0  # powers of two; errors lie between 0 and 1 and prices are at least 1
    for _ in range(60):
        middle = (low + high) / 2
        best = {name: int(np.argmin(errors + 2.0**middle * prices)) for name, (prices, errors) in choices.items()}
        if sum(choices[name][0][index] for name, index in best.items()) <= budget:
            # Whole comes last of the choices of a linear that has it.
            chosen = {name for name, index in best.items() if index == len(spectra[name].singular_values)}
            high = middle
        else:
            low = middle
    return chosen


def _choices(item: Spectrum) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Price and squared relative error of a linear at every rank, then whole if that was tried."""
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
    """What each direction after the first brings for its price, negated so that the best sorts first."""
    price = item.price * (item.energy or 1.0)
    return [(-value * value / price, name) for value in item.singular_values[1:]]
