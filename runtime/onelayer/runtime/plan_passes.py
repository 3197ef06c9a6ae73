"""Shapes and a setting in; what every pass over the original holds on the device at its peak. Torch-free."""

from onelayer.compiler.correct_candidates import trial_bytes
from onelayer.compiler.polish_memory import step_bytes
from onelayer.compiler.ranks import Allocation, rank_for
from onelayer.compiler.refine_memory import training_bytes
from onelayer.compiler.shapes import SLICE_BYTES, Block, Linear, ModelShapes, routed_width
from onelayer.runtime.plan_memory import Setting, compile_bytes, kept_values
from onelayer.runtime.plan_parts import expert_parts, lora_parameters

CHUNK_BYTES = 8 << 20  # correction reads weights in pieces of this size, four at a time
SOLVE_BLOCK_BYTES = 1 << 20
# With ranks by spectrum layers take unequal shares: the largest was measured to train up to 1.16 times its own
# (manifests/LOG.md); half as much again is planned for.
SPECTRUM_MARGIN = 1.5


def pass_bytes(shapes: ModelShapes, ratio: float, setting: Setting) -> dict[str, int]:
    """Bytes by pass, in the order in which they run; a refinement that does not run takes none.

    `compile` takes `setting.compile_tokens` at once, `refine` its `refine_tokens`, `correct` its `scored_tokens`.
    """
    compiled = setting.max_length if setting.compile_tokens is None else setting.compile_tokens
    refined = setting.max_length if setting.refine_tokens is None else setting.refine_tokens
    corrected = correct_bytes(shapes, ratio, setting.lora_rank)
    if setting.scored_tokens:
        corrected = max(corrected, chosen_correct_bytes(shapes, ratio, setting.lora_rank, setting.scored_tokens))
    return {
        "compile": compile_bytes(shapes, setting.widest(ratio), compiled),
        "refine": refine_bytes(shapes, ratio, refined, setting.allocation, setting.on_gpu) if refined else 0,
        "correct": corrected,
    }


def correct_bytes(shapes: ModelShapes, ratio: float, lora_rank: int) -> int:
    """Bound of a correction: of the worst linear pieces of its weight, its factors, and six (out, r) in float64; and
    what is solved, in float64."""

    def cost(linear: Linear) -> int:
        rank = rank_for(ratio, linear.out_features, linear.in_features)
        if rank is None:
            return 0
        pieces = min(4 * CHUNK_BYTES, linear.parameters * shapes.value_bytes)
        sides = linear.out_features + linear.in_features
        return pieces + SOLVE_BLOCK_BYTES + 8 * (rank + 6 * lora_rank) * sides

    solved = 8 * lora_parameters(shapes, lora_rank)
    return solved + max((cost(linear) for block, _ in shapes.kinds for linear in block.compressible), default=0)


def chosen_correct_bytes(shapes: ModelShapes, ratio: float, lora_rank: int, batch_tokens: int) -> int:
    """Bound of a correction that held-out text chooses: block after block of the original runs `batch_tokens` at once,
    beside the block that is read ahead, slices of the head, and every candidate's weights of the adapter."""
    ranks = [
        (rank, linear)
        for block, _ in shapes.kinds
        for linear in block.compressible
        if (rank := rank_for(ratio, linear.out_features, linear.in_features))
    ]
    factors = max((4 * rank * (linear.out_features + linear.in_features) for rank, linear in ranks), default=0)
    tried = trial_bytes(lora_parameters(shapes, lora_rank), factors)
    batch = 4 * batch_tokens * max(_width(shapes, block) for block, _ in shapes.kinds)
    return 2 * shapes.largest_block_bytes + 3 * SLICE_BYTES + batch + tried


def refine_bytes(
    shapes: ModelShapes, ratio: float, batch_tokens: int, allocation: Allocation, on_gpu: bool = True
) -> int:
    """Of a refinement on the card: the block that is refined, and its factors as they are trained.

    A bound with uniform ranks. By spectrum a block may hold more than its share, up to its weights; `SPECTRUM_MARGIN`
    is then a guess, and the pass itself tells its bound from the ranks.
    """
    margin = 1.0 if allocation == "uniform" else SPECTRUM_MARGIN
    costs = []
    for block, _ in shapes.kinds:
        values = [min(linear.parameters, int(margin * kept_values(linear, ratio))) for linear in block.compressible]
        training = training_bytes(values, _width(shapes, block), batch_tokens, shapes.value_bytes, on_gpu)
        costs.append(block.parameters * shapes.value_bytes + training)
    return max(costs)


def polish_bytes(shapes: ModelShapes, lora_rank: int, tokens: int) -> int:
    """Bound of an exact step on the card, on `tokens` at once: the block that computes and what it needs beside."""
    widest = max(_width(shapes, block) for block, _ in shapes.kinds)
    adapter = 5 * 4 * lora_parameters(shapes, lora_rank)
    block = shapes.largest_block_bytes
    return block + step_bytes(block, widest, shapes.value_bytes, tokens, adapter, on_gpu=True)


def _width(shapes: ModelShapes, block: Block) -> int:
    """Inputs and outputs of all matrices of a block for a token, of experts once for each that it is sent to."""
    dense = sum(linear.in_features + linear.out_features for linear in block.linears)
    if block.experts is None:
        return dense
    opened, inner = (width // shapes.experts_per_token for width in expert_parts(shapes, block))
    return dense + routed_width(shapes.experts_per_token, opened, inner, shapes.hidden)
