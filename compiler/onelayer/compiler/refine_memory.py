"""What a refinement will need, told before it runs, from shapes alone: of an emulator, or of headers. No torch."""

from collections.abc import Sequence

from onelayer.compiler.shapes import graph_bytes

# Of every trained value in float32: itself, its gradient, what it was, Adam's two moments, and as it is rounded; that
# once more in the model's dtype, if it is another.
VALUE_BYTES = 26
# Of the widest linear: what a factor becomes on the way to its stored form and back.
ROUNDING_BYTES = 16


def training_bytes(values: Sequence[int], width: int, batch_tokens: int, value_bytes: int, on_gpu: bool) -> int:
    """What training one unit holds beside its weights, at most.

    `values` of each linear are trained; `width` is how many values the unit makes of a token.
    """
    graph = graph_bytes(width, batch_tokens, value_bytes, on_gpu)
    return VALUE_BYTES * sum(values) + ROUNDING_BYTES * max(values, default=0) + graph
