"""A keep-ratio becomes a rank per linear: the same for all, or as the spectra ask (papers call the ratio rho)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import merge


def rank_for(ratio: float, out_features: int, in_features: int) -> int | None:
    """The rank whose factors hold `ratio` of a linear's weights, at least 1; None where the linear stays dense.

    k = floor(ratio * in * out / (in + out)), so that k * (in + out) weights replace in * out.
    """
    rank = max(1, int(ratio * in_features * out_features / (in_features + out_features)))
    return None if rank * (in_features + out_features) >= in_features * out_features else rank


@dataclass(frozen=True)
class Spectrum:
    """What decides a linear's rank: its shape, the leading singular values of its output, the energy of all of them."""

    out_features: int
    in_features: int
    singular_values: Sequence[float]
    energy: float


def ranks_by_spectrum(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, int]:
    """Ranks that spend the weights of a uniform `ratio` where they lower the summed squared relative error most.

    Direction k of a linear takes s_k^2 / energy off the sum and costs in + out weights. Gains fall with k, so taking
    the best directions of all linears until the budget is spent is optimal, and each linear gets a prefix, at least 1.
    """
    budget = 0
    for item in spectra.values():
        uniform = rank_for(ratio, item.out_features, item.in_features)
        assert uniform is not None, "linears that stay dense have no spectrum"
        budget += (uniform - 1) * (item.out_features + item.in_features)
    ranks = dict.fromkeys(spectra, 1)
    for _, name in merge(*(_gains(name, item) for name, item in spectra.items())):
        cost = spectra[name].out_features + spectra[name].in_features
        if cost > budget:
            break
        budget -= cost
        ranks[name] += 1
    return ranks


def _gains(name: str, item: Spectrum) -> list[tuple[float, str]]:
    """What each direction after the first brings per weight, negated so that the best sorts first."""
    price = (item.out_features + item.in_features) * (item.energy or 1.0)
    return [(-value * value / price, name) for value in item.singular_values[1:]]
