"""What a refinement will need, told before it runs, from shapes alone: of an emulator, or of headers. No torch."""

from collections.abc import Sequence

# Of every trained value in float32: itself, its gradient, what it was, Adam's two moments, and as it is rounded; that
# once more in the model's dtype, if it is another.
VALUE_BYTES = 26
# Of the widest linear: what a factor becomes on the way to its stored form and back.
ROUNDING_BYTES = 16


def training_bytes(values: Sequence[int], width: int, batch_tokens: int, value_bytes: int) -> int:
    """What training one unit holds beside its weights, at most.

    `values` of each linear are trained; `width` are the inputs and outputs of all matrices of the unit for a token. The
    graph of one batch is counted by these and about as much again for norms, activations and sums, as in an exact step;
    half of that once more for the holes that step after step leaves in the heap: a third slower they were given back.
    """
    graph = 2 * batch_tokens * width * max(4, value_bytes)
    return VALUE_BYTES * sum(values) + ROUNDING_BYTES * max(values, default=0) + graph + graph // 2
