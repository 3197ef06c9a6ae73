"""Predicts the device peak of every pass over the original, from shapes alone. Torch-free."""

from onelayer.compiler.codes.forms import WINDOW_BITS, group_size
from onelayer.compiler.correct.candidates import CANDIDATES
from onelayer.compiler.correct.memory import CorrectedShape, correction_bytes, trial_bytes
from onelayer.compiler.factors.ranks import Allocation, rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.machine.primitives import primitive_bytes
from onelayer.compiler.models.unit_memory import (
    ADAPTER_COPIES,
    EXPERT_ROWS,
    CompiledShape,
    anchoring_bytes,
    code_training_bytes,
    coding_bytes,
    compiling_bytes,
    graph_bytes,
    head_bytes,
    moment_bytes,
    scoring_bytes,
    solving_bytes,
    states_bytes,
    step_bytes,
    training_bytes,
    weighing_bytes,
)
from onelayer.runtime.planning.coded import coded_emulator, coded_experts, largest_decoding_bytes
from onelayer.runtime.planning.shapes import BlockShape, LinearShape, ModelShapes
from onelayer.runtime.planning.sub_blocks import (
    MASTER_BYTES,
    block_values,
    expert_parts,
    inputs_read,
    lora_parameters,
    most_values,
    sub_blocks,
)
from onelayer.runtime.planning.train_memory import PlannedRun, TrainMemory, expert_factor_bytes, values_at

# With ranks by spectrum, layers take unequal shares. The largest was measured at up to 1.16 times its uniform share
# (manifests/LOG.md), so the planner allows 1.5 times.
SPECTRUM_MARGIN = 1.5
# The ratio at which all weights are kept, only rounded.
WHOLE = 1.0


def pass_bytes(shapes: ModelShapes, ratio: float, planned: PlannedRun) -> dict[str, int]:
    """Predict bytes by pass, in running order. A refinement that does not run takes none.

    Tokens at once are `planned.compile_tokens` for `compile`, `refine_tokens` for `refine` and `scored_tokens` for
    `correct`.
    """
    compiled = planned.max_length if planned.compile_tokens is None else planned.compile_tokens
    refined = planned.max_length if planned.refine_tokens is None else planned.refine_tokens
    # A correction uses codes as the whole weights that they stand for.
    kept = WHOLE if planned.coded else ratio
    corrected = correct_bytes(shapes, kept, planned.lora_rank)
    if planned.scored_tokens:
        chosen = chosen_correct_bytes(shapes, kept, planned.lora_rank, planned.scored_tokens, planned.on_gpu)
        corrected = max(corrected, chosen)
    found = {
        "compile": compile_bytes(
            shapes, planned.widest(ratio), compiled, planned.coded, planned.compile_backward, planned.on_gpu
        ),
        "refine": refined
        and refine_bytes(
            shapes,
            ratio,
            refined,
            planned.allocation,
            planned.on_gpu,
            planned.coded,
            backward=planned.refine_backward,
        ),
        "correct": corrected,
    }
    kernels = primitive_bytes(shapes.value_bytes, planned.on_gpu)
    return {name: size and size + kernels for name, size in found.items()}


def correct_bytes(shapes: ModelShapes, ratio: float, lora_rank: int) -> int:
    """Bound a correction with a given limit, for an adapter on every linear.

    A linear without a rank is quantized whole.
    """

    def shape(linear: LinearShape) -> CorrectedShape:
        rows, columns = linear.out_features, linear.in_features
        rank = rank_for(ratio, rows, columns) or min(rows, columns)
        return CorrectedShape(rows, columns, rank, lora_rank, linear.parameters * shapes.value_bytes)

    return correction_bytes([shape(linear) for block in shapes.blocks for linear in block.compressible])


def chosen_correct_bytes(
    shapes: ModelShapes, ratio: float, lora_rank: int, batch_tokens: int, on_gpu: bool = True
) -> int:
    """Bound a correction chosen by held-out text: an evaluation plus the adapter weights of every candidate."""
    factors = [[values_at(linear, ratio) for linear in block.compressible] for block, _ in shapes.kinds]
    tried = trial_bytes(len(CANDIDATES), lora_parameters(shapes, lora_rank), factors, on_gpu)
    return evaluate_bytes(shapes, batch_tokens, on_gpu) + tried


def evaluate_bytes(shapes: ModelShapes, batch_tokens: int, on_gpu: bool = True) -> int:
    """Bound an evaluation on the device, with `batch_tokens` at once."""
    head, block = _head_bytes(shapes, batch_tokens), shapes.largest_block_bytes
    return block + scoring_bytes(block, head, most_values(shapes, batch_tokens), on_gpu)


def _head_bytes(shapes: ModelShapes, tokens: int) -> int:
    """Bound what reading the head by slices holds; see `head_bytes`."""
    if not shapes.has_vocabulary_head:
        return 0
    return head_bytes(shapes.vocabulary, shapes.hidden, shapes.value_bytes, tokens)


def anchor_bytes(shapes: ModelShapes, batch_tokens: int, on_gpu: bool = True) -> int:
    """Bound what finding offsets holds in addition to the emulator: a block of the original, and its workspace."""
    block = shapes.largest_block_bytes
    return block + anchoring_bytes(block, most_values(shapes, batch_tokens), shapes.value_bytes, on_gpu)


def renewal_bytes(shapes: ModelShapes, memory: TrainMemory, planned: PlannedRun) -> int:
    """Bound what a renewal holds on the device: emulator and adapter, a block of the original and its workspace."""
    decoding = largest_decoding_bytes(shapes) if planned.coded else 0
    return memory.emulator + memory.adapter + decoding + anchor_bytes(shapes, planned.tokens, planned.on_gpu)


def refine_bytes(
    shapes: ModelShapes,
    ratio: float,
    batch_tokens: int,
    allocation: Allocation,
    on_gpu: bool = True,
    coded: bool = False,
    backward: bool = False,
) -> int:
    """Bound a refinement on the device: the block that is refined, plus its factors while they are trained.

    With `backward` the block learns gradients too.

    With uniform ranks this is a true bound. With ranks by spectrum a block may hold more than its share, up to its
    weights; `SPECTRUM_MARGIN` is then an estimate, and the pass itself computes its bound from the ranks.
    """
    margin = 1.0 if allocation == "uniform" else SPECTRUM_MARGIN
    codes = coded_emulator(shapes, ratio) if coded else None
    experts = coded_experts(shapes, ratio) if coded else None
    costs = []
    for block, _ in shapes.kinds:
        values = [min(linear.parameters, int(margin * values_at(linear, ratio))) for linear in block.compressible]
        if codes is not None:
            values = [codes.trained_values(linear) for linear in block.compressible]
        decoded = [] if codes is None else [linear.parameters for linear in block.compressible]
        whole = sum(decoded)
        if experts is not None and block.experts is not None:
            count = block.experts.count
            values += [count * experts.trained_values(stack) for stack in block.stacks]
            decoded += [stack.parameters for stack in block.stacks]
            whole += count * sum(stack.parameters for stack in block.stacks)
        twice = sum(values) + whole if backward else 0
        training = code_training_bytes(max(decoded, default=0))
        training += training_bytes(values, block_values(shapes, block, batch_tokens), shapes.value_bytes, on_gpu, twice)
        head = _head_bytes(shapes, batch_tokens) if backward else 0
        costs.append(block.parameters * shapes.value_bytes + max(training, head))
    return max(costs)


def polish_bytes(shapes: ModelShapes, lora_rank: int, tokens: int, on_gpu: bool = True) -> int:
    """Bound an exact step on the device, with `tokens` at once: the computing block and everything it needs."""
    adapter = ADAPTER_COPIES * MASTER_BYTES * lora_parameters(shapes, lora_rank)
    block = shapes.largest_block_bytes
    graph = graph_bytes(most_values(shapes, tokens), shapes.value_bytes, on_gpu)
    head = _head_bytes(shapes, tokens)
    return block + step_bytes(block, _norm_bytes(shapes), head, graph, adapter, on_gpu)


def _norm_bytes(shapes: ModelShapes) -> int:
    """Bound the last unit of a model with a head by itself: a norm, with scales and offsets."""
    return 2 * shapes.hidden * shapes.value_bytes


def streamed_bytes(shapes: ModelShapes, planned: PlannedRun) -> int:
    """Bound a step of a streamed original on the device, with one row at once and the loss of the whole batch."""
    adapter = ADAPTER_COPIES * MASTER_BYTES * lora_parameters(shapes, planned.lora_rank)
    block, value_bytes, tokens = shapes.largest_block_bytes, shapes.value_bytes, planned.tokens
    graph = graph_bytes(most_values(shapes, planned.max_length), value_bytes, planned.on_gpu)
    head = _head_bytes(shapes, tokens)
    head += states_bytes(shapes.hidden, value_bytes, tokens, planned.on_gpu)
    step = step_bytes(block, _norm_bytes(shapes), head, graph, adapter, planned.on_gpu)
    return block + step + (0 if planned.on_gpu else shapes.unpacking_bytes)


# The size of a Python process that has only imported these libraries.
PROCESS_BYTES = 500 << 20


def compile_bytes(
    shapes: ModelShapes,
    ratio: float,
    batch_tokens: int,
    coded: bool = False,
    backward: bool = False,
    on_gpu: bool = True,
) -> int:
    """Predict the device peak of a compile: the largest block, its moments, and its last batch or its solver.

    With codes, or with factors and `backward`, the way back through a block is added. Experts that are too small for
    codes are compressed as factors. A host counts images or sound as the pass does.
    """
    in_codes = coded and coded_experts(shapes, ratio) is not None
    factored = [block for block, _ in shapes.kinds if not coded or (block.experts is not None and not in_codes)]
    peaks = [_compile_block(shapes, block, ratio, batch_tokens, on_gpu) for block in factored]
    if backward and not coded:
        head = _head_bytes(shapes, batch_tokens)
        back = (
            weighing_bytes(block.compressible_sides, _graph(shapes, block, batch_tokens), head) for block in factored
        )
        return max(peak + weighed for peak, weighed in zip(peaks, back, strict=True))
    return max([*peaks, coded_compile_bytes(shapes, ratio, batch_tokens)] if coded else peaks)


def coded_compile_bytes(shapes: ModelShapes, ratio: float, batch_tokens: int, on_gpu: bool = True) -> int:
    """Bound what a compile to codes holds on the device: the largest block, and what coding its linears takes."""
    head, found = _head_bytes(shapes, batch_tokens), (coded_emulator(shapes, ratio), coded_experts(shapes, ratio))
    bits = [WINDOW_BITS if emulator is None else emulator.code.bits for emulator in found]

    def coding(block: BlockShape) -> int:
        graph = _graph(shapes, block, batch_tokens, on_gpu=on_gpu)
        linears = coding_bytes(block.compressible_sides, graph, head, on_gpu, bits[0], inputs_read(block))
        return max(linears, _coded_expert_bytes(shapes, block, bits[1]))

    return max(block.parameters * shapes.value_bytes + coding(block) for block, _ in shapes.kinds)


def _coded_expert_bytes(shapes: ModelShapes, block: BlockShape, bits: int) -> int:
    """Count what one expert holds while it is coded: moments of its rows and of all tokens, some rows, the solver."""
    experts = [(stack.out_features, stack.in_features) for stack in block.stacks]
    moments = 2 * sum(8 * columns * group_size(columns) for _, columns in experts)
    rows = EXPERT_ROWS * sum(map(sum, experts)) * shapes.value_bytes
    return moments + max([rows, *(coding_bytes([expert], 0, 0, True, bits) for expert in experts)])


def _graph(shapes: ModelShapes, block: BlockShape, batch_tokens: int, *, on_gpu: bool = True) -> int:
    return graph_bytes(block_values(shapes, block, batch_tokens), shapes.value_bytes, on_gpu)


def _compile_block(shapes: ModelShapes, block: BlockShape, ratio: float, batch_tokens: int, on_gpu: bool) -> int:
    parts = sub_blocks(block)
    rows = block.rows(batch_tokens)
    moments = widest = 0
    for part in parts:
        shared = any(linear.out_features >= linear.in_features for linear in part.readers)
        sides = [part.hidden] if shared else [min(linear.out_features, linear.in_features) for linear in part.readers]
        sides += [min(part.closing.out_features, part.closing.in_features)] if part.closing else []
        moments += moment_bytes(sides)
        widest = max([widest, *sides])
    linears = [compiled_shape(linear, ratio, shapes.value_bytes) for linear in block.compressible]
    width = max((part.opened + part.inner + 3 * part.hidden for part in parts), default=4 * block.hidden)
    inner = max((part.inner for part in parts), default=0)
    batch = rows * (width * shapes.value_bytes + 8 * inner) + moment_bytes([widest])
    opened, inner = expert_parts(shapes, block)
    routed = rows * (opened + inner + 2 * shapes.experts_per_token * block.hidden) * shapes.value_bytes
    in_experts = sum(linear.stored_bytes for linear in linears) + _expert_bytes(shapes, block, ratio)
    fullest = max(solving_bytes(linears), batch, routed if inner else 0, in_experts)
    block_bytes = block.parameters * shapes.value_bytes
    held = block_bytes + moments + fullest
    if on_gpu or shapes.media is None:
        return held
    # A host also holds holes that the rows of images leave in its heap, and the next block, as the pass promises.
    return max(held, shapes.largest_block_bytes + compiling_bytes(linears, rows, block_bytes, on_gpu=False))


def compiled_shape(linear: LinearShape, ratio: float, value_bytes: int) -> CompiledShape:
    """Return a linear as a compile sees it; one whose factors would not be smaller is counted as rounded to int8."""
    rank = rank_for(ratio, linear.out_features, linear.in_features)
    factor_dtype: FactorDtype | None = "int8" if rank is None else None
    return CompiledShape(linear.out_features, linear.in_features, rank, value_bytes, factor_dtype)


def _expert_bytes(shapes: ModelShapes, block: BlockShape, ratio: float) -> int:
    """Count what one expert holds while it is solved: moments of its rows and of all tokens, some rows, the solver."""
    if block.experts is None:
        return 0
    experts = [compiled_shape(stack, ratio, shapes.value_bytes) for stack in block.experts.stacks]
    moments = 2 * moment_bytes(expert.narrow for expert in experts)
    width = sum(expert.out_features + expert.in_features for expert in experts)
    rows = EXPERT_ROWS * (width * shapes.value_bytes + 8 * max(expert.narrow for expert in experts))
    return moments + max([rows, *(expert.solver_bytes for expert in experts if expert.rank is not None)])


def host_bytes(shapes: ModelShapes, samples: int, max_length: int, ratio: float) -> int:
    """Predict the host memory of a compile.

    It is the process, the next block read ahead and converted, what unpacking holds, the waiting hidden states, a
    second copy of those that a block's experts read, and their factors twice.
    """
    copies = 3 if any(block.experts is not None for block in shapes.blocks) else 2
    states = samples * max_length * shapes.hidden * copies * max(shapes.value_bytes, 2)
    weights = 2 * shapes.largest_block_bytes + shapes.unpacking_bytes
    return PROCESS_BYTES + weights + states + 2 * expert_factor_bytes(shapes, ratio)
