"""Formulas for the memory of a pass over the original, torch-free; planner and passes share them.

Everything is in bytes unless a name says otherwise. `unit_values` is how many values all matrices of a unit read and
give for one batch, experts as in `routed_width`; for several units it is that of the unit which has the most.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onelayer.compiler.codes.forms import CODE_SHAPES, DECODED_VALUES, OUTPUT_BLOCK, group_size, search_bytes
from onelayer.compiler.factors.stored_forms import FactorDtype, linear_bytes

# What libraries and the allocator take on first use whatever the model: measured 20 to 50 MB on a CPU.
RESERVE_BYTES = 64 << 20
# A matrix that stays on disk is applied by slices of this size, so that it costs as much whatever the vocabulary.
SLICE_BYTES = 64 << 20
# Copies of a slice of logits in float32 while they are scored, or while their gradient is taken.
LOGITS_COPIES = 2
# Logits of two models are compared at most this many at a time, in float64: both, and three results.
COMPARED_VALUES = 1 << 20
# Per trained value in float32: itself, its gradient, what it was, Adam's two moments, and its rounded form; that once
# more in the model's dtype, if it is another.
TRAINED_VALUE_BYTES = 26
# An exact step holds an adapter this many times: its values, their gradients, Adam's two moments and the best so far.
ADAPTER_COPIES = 5
# Per value of the widest linear: what a factor becomes on the way to its stored form and back.
ROUNDING_BYTES = 16
# A linear that holds less than this share of its block's linear weights stays dense: a router or a gate saves nothing
# and decides much.
SMALL_SHARE = 0.005
# Rows of one expert that are computed at a time when its moments are taken.
EXPERT_ROWS = 1024
EXPERTS_PER_TOKEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "experts_per_token")


def routed_width(experts_per_token: int, opened: int, inner: int, hidden: int) -> int:
    """Count the values that experts read and give for one token, once for each expert that it is sent to.

    The first matrix takes `hidden` features to `opened` ones; the second takes the `inner` that are left of these back.
    """
    return experts_per_token * (opened + inner + 2 * hidden)


def graph_bytes(unit_values: int, value_bytes: int, on_gpu: bool) -> int:
    """Bound what the graph of one unit takes on a batch; on a host with the holes that it leaves in the heap.

    Norms, activations and residual sums take as much again as the matrices. On a host all of it counts twice: glibc's
    heap keeps holes between tensors below 32 MB and gives them back only when asked; asking at every step would take a
    third longer (manifests/LOG.md).
    """
    return (2 if on_gpu else 4) * unit_values * max(4, value_bytes)


def training_bytes(
    values: Sequence[int], unit_values: int, value_bytes: int, on_gpu: bool, differentiated: int = 0
) -> int:
    """Bound what training the factors of one unit holds in addition to its weights; `values` of each linear train.

    Where gradients are learned too, `differentiated` counts the values that have a second derivative: the trained ones
    and decoded weights. They are in the graph in float32 and in the model's dtype, if that is another, with a gradient
    each, and the graph is that of the original, of the emulator and of its way back.
    """
    graphs = (3 if differentiated else 1) * graph_bytes(unit_values, value_bytes, on_gpu)
    weights = 2 * (4 + (value_bytes if value_bytes != 4 else 0)) * differentiated
    return TRAINED_VALUE_BYTES * sum(values) + ROUNDING_BYTES * max(values, default=0) + graphs + weights


def head_bytes(vocabulary: int, hidden: int, value_bytes: int, tokens: int) -> int:
    """Bound what a head that is read by slices holds: a slice of its weight and the copies of a slice of logits.

    These are in float32, and one is in the model's dtype if that is another. A head that is smaller than a slice takes
    its own size. The hidden states and their gradient come with their copies.
    """
    weight, slice_values = vocabulary * hidden * value_bytes, min(SLICE_BYTES // 4, vocabulary * tokens)
    logits = (4 * LOGITS_COPIES + (value_bytes if value_bytes != 4 else 0)) * slice_values
    return min(SLICE_BYTES, weight) + logits + 4 * 4 * hidden * tokens


def comparing_bytes(vocabulary: int, tokens: int) -> int:
    """Bound what comparing two models' logits holds in addition to scoring one: the other's slice, and the results."""
    values = vocabulary * tokens
    return min(SLICE_BYTES, 4 * values) + (5 * 8 + 1) * min(COMPARED_VALUES, values)


def step_bytes(unit_bytes: int, last_bytes: int, head: int, graph: int, adapter_bytes: int, on_gpu: bool) -> int:
    """Bound what an exact step on one micro-batch holds in addition to the largest unit, of `unit_bytes`.

    The adapter with its optimizer, the `graph` of the widest unit or, with the last unit of `last_bytes` in the largest
    one's place, the `head` with its gradients, and a reserve. A host holds the unit that is read ahead too, and keeps
    holes of the one while it has the other. Kept unit inputs are not in it: they lie on the host and are reported by
    themselves.
    """
    on_host = unit_bytes + graph + head
    return RESERVE_BYTES + adapter_bytes + (max(graph, head + last_bytes - unit_bytes) if on_gpu else on_host)


def states_bytes(hidden: int, value_bytes: int, tokens: int, on_gpu: bool) -> int:
    """Bound what the hidden states of a whole batch hold in addition to the loss: a streamed model gives them to all.

    As the layers gave them, as they wait for the way back, and with the gradients of both. On a host with the holes
    that they leave in the heap (measured in float32, with the copies of the loss: 35 to 39 bytes a value).
    """
    return tokens * hidden * (4 * value_bytes if on_gpu else 5 * max(4, value_bytes))


def resident_bytes(weight_bytes: int, all_values: int, value_bytes: int, on_gpu: bool) -> int:
    """Bound what training an adapter of a model that is held whole takes for a batch.

    `all_values` is how many values all matrices of the model read and give for the batch, the head's included.
    """
    return weight_bytes + RESERVE_BYTES + graph_bytes(all_values, value_bytes, on_gpu)


def anchoring_bytes(unit_bytes: int, unit_values: int, value_bytes: int, on_gpu: bool) -> int:
    """Bound what finding the offsets of one batch holds in addition to the emulator and the unit that computes.

    Activations of one batch in the widest unit, of the original and of the emulator. On a host, holes in its heap as in
    `graph_bytes` and the unit that is read ahead too. Waiting batches and offsets are not in it: they lie on the host.
    """
    return RESERVE_BYTES + graph_bytes(unit_values, value_bytes, on_gpu) + (0 if on_gpu else unit_bytes)


def scoring_bytes(unit_bytes: int, head: int, unit_values: int, on_gpu: bool) -> int:
    """Bound what scoring one batch holds in addition to the unit that computes.

    The activations of one batch in the widest unit, or in the unit's place the slices of the `head`, and a reserve. A
    host holds both, and the unit that is read ahead. Waiting batches are not in it: they lie on the host.
    """
    activations = 4 * unit_values
    return RESERVE_BYTES + (max(activations, head - unit_bytes) if on_gpu else unit_bytes + activations + head)


def moment_bytes(sides: Iterable[int]) -> int:
    """Count square moments in float64, one for each of `sides`, which are numbers of features."""
    return sum(8 * side * side for side in sides)


def adding_bytes(side: int) -> int:
    """Count what adding to a square moment takes: a product in float32, and in float64 its rounding to a grid."""
    return (4 + 8 + 8) * side * side


@dataclass(frozen=True)
class CompiledShape:
    """A linear that a compile stores: its sides, its rank (None: as a whole weight), and the form that is stored.

    `value_bytes` is the size of the model's dtype. Without a `factor_dtype` factors keep that dtype. With `keeps_whole`
    a quantized linear is stored in both forms until its rank is chosen.
    """

    out_features: int
    in_features: int
    rank: int | None
    value_bytes: int
    factor_dtype: FactorDtype | None = None
    keeps_whole: bool = False

    @property
    def narrow(self) -> int:
        """The narrow side, which is as wide as the linear's moment."""
        return min(self.out_features, self.in_features)

    @property
    def solver_bytes(self) -> int:
        """Bound what compressing it holds in addition to its weight and moment."""
        if self.rank is None:  # what rounding a whole weight loses is judged in float64: three matrices
            return 3 * 8 * self.out_features * self.in_features
        if self.factor_dtype is None:
            return self._solver_bytes(self.value_bytes)
        return max(self._solver_bytes(4), self._rounding_bytes)

    def _solver_bytes(self, factor_value_bytes: int) -> int:
        """Bound the solver.

        In float64 these are the weight, its product with a square root of the moment, and the eigenproblem of the
        narrow side with its workspace; then the factors, three products of `down` with the moment, and a product of
        `up`. The basis exists twice, and so does the stored factor made from it.
        """
        rows, columns, narrow, rank = self.out_features, self.in_features, self.narrow, self.rank or 0
        product = 8 * rows * columns if rows > columns else 0
        solve = product + 8 * 4 * narrow * narrow
        judge = 8 * rank * (rows + 4 * columns)
        return 8 * rows * columns + max(solve, judge) + (2 * 8 + factor_value_bytes) * rank * rows

    @property
    def _rounding_bytes(self) -> int:
        """Bound the quantization of its factors, in float64, next to the factors themselves in float32.

        It takes two matrices as large as the weight, and each factor three times. If the whole weight is quantized
        too, that takes four matrices.
        """
        matrix = 8 * self.out_features * self.in_features
        factors = (self.rank or 0) * (self.out_features + self.in_features)
        return 4 * factors + max(2 * matrix + 3 * 8 * factors, 4 * matrix if self.keeps_whole else 0)

    @property
    def stored_bytes(self) -> int:
        """Count what is stored of it."""
        shape = (self.out_features, self.in_features)
        forms = {self.rank, None} if self.keeps_whole else {self.rank}
        return sum(linear_bytes(*shape, rank, self.factor_dtype, self.value_bytes) for rank in forms)


def solving_bytes(linears: Sequence[CompiledShape], on_gpu: bool = False) -> int:
    """Bound what compressing the linears of a unit holds at its end: the largest solver, and all that is stored.

    From a card, what is stored moves to the host: it has that of the linear that is solved and of the one before.
    """
    solver = max((linear.solver_bytes for linear in linears), default=0)
    stored = [linear.stored_bytes for linear in linears]
    return solver + (2 * max(stored, default=0) if on_gpu else sum(stored))


def compiling_bytes(
    linears: Sequence[CompiledShape], rows: int, unit_bytes: int, on_gpu: bool, in_experts: Sequence[int] = ()
) -> int:
    """Bound what computing factors of the linears of a unit holds in addition to the largest unit.

    The moments of the unit, each linear's by itself; the inputs and outputs of its linears for `rows` at once, and
    after these the solver of the widest linear and what is stored. A host keeps holes of the batch while it solves, all
    that is stored, and the unit of `unit_bytes` that is read ahead. `in_experts` is what each module of experts takes.
    """
    moments = moment_bytes(linear.narrow for linear in linears)
    values = rows * sum(linear.out_features + linear.in_features for linear in linears)
    solver = solving_bytes(linears, on_gpu)
    if on_gpu:
        batch = 4 * values + adding_bytes(max((linear.narrow for linear in linears), default=0))
        return max([moments + max(solver, batch), *in_experts])
    return unit_bytes + max([moments + solver + 8 * values, *in_experts])


def coding_bytes(
    shapes: Iterable[tuple[int, int]],
    graph: int,
    head: int,
    on_gpu: bool,
    bits: int,
    inputs: Iterable[int] | None = None,
    backward: bool = True,
) -> int:
    """Bound what coding the linears (out, in) of a unit in `bits` bits holds in addition to its weights.

    `inputs` are the features of what they read, once for linears that read the same; None if each reads its own. The
    moments of the inputs and, with `backward`, of the gradients at the outputs of all of them in float64, with the
    `graph` of one micro-batch while they are gathered; then the factors of both sides of one, its weight in float32
    three times and the paths of the search as it is coded, or seven times as its residual is solved, with what is
    stored of it and of the one before. Before that, slices of the `head` and their gradients. A host keeps holes of
    each while it has the others. Kept unit inputs are not in it: they lie on the host, or in files if the host is the
    device.
    """
    linears = list(shapes)
    read = [columns for _, columns in linears] if inputs is None else list(inputs)
    of_outputs = [8 * rows * OUTPUT_BLOCK if backward else 0 for rows, _ in linears]
    sides = sum(of_outputs) + sum(8 * columns * group_size(columns) for columns in read)
    own = [
        8 * columns * group_size(columns) + outputs for (_, columns), outputs in zip(linears, of_outputs, strict=True)
    ]
    values = max((rows * columns for rows, columns in linears), default=0)
    search = max((search_bytes(*shape, bits) for shape in linears), default=0)
    solver = max(own, default=0) + max(3 * max(own, default=0) + (7 * 4 + 1) * values, search)
    return max(sides + max(graph, solver), head) if on_gpu else sides + solver + graph + head


def weighing_bytes(shapes: Iterable[tuple[int, int]], graph: int, head: int) -> int:
    """Bound what weighing the factors of a unit's linears (out, in) by gradients holds in addition to computing them.

    The moments of the gradients at all outputs and three times those of one as they are factored, one weight and its
    moments once more in float64, the `graph` of one micro-batch, slices of the `head` and their gradients. Kept unit
    inputs are not in it, as in `coding_bytes`.
    """
    linears = list(shapes)
    outputs = [8 * rows * OUTPUT_BLOCK for rows, _ in linears]
    weighted = max((8 * (2 * rows * columns + min(rows, columns) ** 2) for rows, columns in linears), default=0)
    return sum(outputs) + 3 * max(outputs, default=0) + weighted + graph + head


def decoding_bytes(values: int, value_bytes: int) -> int:
    """Bound what a product with a coded weight of `values` holds while it runs.

    What is decoded at once twice, since a product may compute in another dtype, and for each of its codes, one for at
    least two values, a window of one byte and the number of four bytes that a look-up takes.
    """
    values = min(values, DECODED_VALUES)
    return values * 2 * value_bytes + 5 * -(-values // min(shape.width for shape in CODE_SHAPES))


def code_training_bytes(values: int) -> int:
    """Bound what the way back through a coded weight of `values` holds when its codebook and scales are trained.

    In float32 the decoded weight, the gradient of the weight, and that gradient by scales and by entries, with what
    each is multiplied by.
    """
    return 6 * 4 * values
