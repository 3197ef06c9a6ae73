"""What an exact step will need, told before it runs, from shapes alone."""

from onelayer.compiler.lazy import SLICE_BYTES
from onelayer.compiler.polish_data import TrainRows
from onelayer.compiler.polish_job import Settings
from onelayer.compiler.polish_state import PolishState
from onelayer.compiler.units import StreamedModel


def workspace_bytes(streamed: StreamedModel, rows: TrainRows, settings: Settings, state: PolishState) -> int:
    """What a step holds beside the largest unit, at most.

    The unit that is read ahead, the head's slices and their gradients, the adapter with its optimiser, and the graph of
    one unit for one micro-batch. Kept unit inputs are not in it: they lie on the host and are reported by themselves.
    """
    longest = settings.max_length if settings.packing else min(settings.max_length, rows.longest)
    tokens = settings.micro_batch_size * longest
    return 4 * SLICE_BYTES + streamed.largest_unit_bytes + state.bytes + tokens * graph_bytes_per_token(streamed)


def graph_bytes_per_token(streamed: StreamedModel) -> int:
    """Bytes per token of what autograd keeps inside the widest unit: each linear's input and output, twice.

    Norms, activations and residual sums keep about as much again as the linears do, which is the factor of two.
    """
    widths = []
    for unit in streamed.units:
        shapes = (streamed.bare_parameter(name).shape for name in unit.parameters if name not in unit.lazy)
        widths.append(sum(sum(shape[-2:]) for shape in shapes if len(shape) >= 2))
    return 2 * max(widths) * max(4, streamed.dtype.itemsize)
