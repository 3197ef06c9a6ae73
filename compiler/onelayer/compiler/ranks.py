"""A keep-ratio becomes a rank per linear (EMLoC, arXiv 2506.12015, section 3.1; papers call the ratio rho)."""


def rank_for(ratio: float, out_features: int, in_features: int) -> int | None:
    """The rank whose factors hold `ratio` of a linear's weights, at least 1; None where the linear stays dense.

    k = floor(ratio * in * out / (in + out)), so that k * (in + out) weights replace in * out.
    """
    rank = max(1, int(ratio * in_features * out_features / (in_features + out_features)))
    return None if rank * (in_features + out_features) >= in_features * out_features else rank
