"""What an exact step will need, told before it runs, from shapes alone: of the empty model, or of headers. No torch."""

from typing import TYPE_CHECKING

from onelayer.compiler.shapes import SLICE_BYTES, graph_bytes

if TYPE_CHECKING:
    from onelayer.compiler.polish_data import TrainRows
    from onelayer.compiler.polish_job import Settings
    from onelayer.compiler.polish_state import PolishState
    from onelayer.compiler.units import StreamedModel


def step_bytes(unit_bytes: int, width: int, value_bytes: int, tokens: int, adapter_bytes: int, on_gpu: bool) -> int:
    """What a step on `tokens` at once holds beside the unit that computes, at most.

    The unit that is read ahead, the head's slices and their gradients, the adapter with its optimiser, and the graph of
    one unit, of which the widest makes `width` values of a token. Kept unit inputs are not in it: they lie on the host
    and are reported by themselves.
    """
    return unit_bytes + 4 * SLICE_BYTES + adapter_bytes + graph_bytes(width, tokens, value_bytes, on_gpu)


def workspace_bytes(
    streamed: "StreamedModel", width: int, rows: "TrainRows", settings: "Settings", state: "PolishState", on_gpu: bool
) -> int:
    """The same for a polish that is about to run."""
    longest = settings.max_length if settings.packing else min(settings.max_length, rows.longest)
    tokens = settings.micro_batch_size * longest
    return step_bytes(streamed.largest_unit_bytes, width, streamed.dtype.itemsize, tokens, state.bytes, on_gpu)
