"""What of a model is compressed, decided from shapes alone: linears, ranks, and the memory and disk it will take."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE, CodeShape, coded_bytes, fitting_codes, group_size
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype, kept_values, linear_bytes
from onelayer.compiler.models.experts import ExpertStacks, stacks_below
from onelayer.compiler.models.linears import expert_width, head_workspace, stack_shapes, unit_linears, weight_shape
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import (
    EXPERT_ROWS,
    RESERVE_BYTES,
    SMALL_SHARE,
    CompiledShape,
    adding_bytes,
    coding_bytes,
    compiling_bytes,
    graph_bytes,
    moment_bytes,
    weighing_bytes,
)
from onelayer.compiler.streaming.unit_loads import UnitLoads

Ranks = Mapping[str, int | None]


@dataclass(frozen=True)
class Choice:
    """The ranks of all that is compressed: of linears, coded in `code`, and of stacks of experts, in `stack_code`.

    Without these codes there are factors alone.
    """

    linears: Ranks
    stacks: Ranks
    code: CodeShape | None = None
    stack_code: CodeShape | None = None


def choose_ranks(streamed: StreamedModel, ratio: float, quantized: bool = False) -> dict[str, int | None]:
    """Choose the rank of every linear of the repeated layers that is worth compressing, by runtime module name.

    One whose factors would not be smaller is left out, or if `quantized` has the rank None: it is quantized whole. One
    whose weight is shared with another layer stays as it is: factors of either would not serve both. Raises
    `InputError` if there is none.
    """
    ranks: dict[str, int | None] = {}
    tied = streamed.library.tied_names(streamed.model)
    for unit in streamed.units:
        shapes = {name: weight_shape(module) for name, module in unit_linears(unit)}
        total = sum(out_features * in_features for out_features, in_features in shapes.values())
        for name, (out_features, in_features) in shapes.items():
            rank = rank_for(ratio, out_features, in_features)
            free = unit.is_block and f"{name}.weight" not in tied
            if free and (quantized or rank is not None) and out_features * in_features >= SMALL_SHARE * total:
                ranks[name] = rank
    if not ranks:
        architecture = type(streamed.model).__name__
        raise InputError(
            f"{streamed.checkpoint.directory}: {architecture} has no linears in repeated layers to factorize"
        )
    return ranks


def choose_codes(
    streamed: StreamedModel, names: Collection[str], share: float
) -> tuple[CodeShape, dict[str, int | None]] | None:
    """Choose codes and the rank of each named linear's residual factors, for all to take `share` of their 16-bit size.

    None if codes do not fit, see `fitting_codes`.
    """
    return fitting_codes({name: weight_shape(streamed.model.get_submodule(name)) for name in names}, share)


def choose_stacks(streamed: StreamedModel, ratio: float, quantized: bool = False) -> dict[str, int | None]:
    """Choose the rank of every stack of experts in the repeated layers worth compressing, by its runtime name.

    One rank for all experts of a stack. As in `choose_ranks`, None stands for matrices that are quantized whole.
    """
    ranks = {}
    tied = streamed.library.tied_names(streamed.model)
    for unit in streamed.units:
        for stacks in stacks_below(unit.name, unit.module) if unit.is_block else ():
            for leaf in stacks.leaves:
                rank = rank_for(ratio, *stacks.shape(leaf)[1:])
                if stacks.path(leaf) not in tied and (quantized or rank is not None):
                    ranks[stacks.path(leaf)] = rank
    return ranks


def choose_stack_codes(
    streamed: StreamedModel, names: Collection[str], share: float
) -> tuple[CodeShape, dict[str, int | None]] | None:
    """Like `choose_codes`, for the experts of the named stacks; None also if some of them would not be coded."""
    shapes = {name: shape[1:] for name, shape in stack_shapes(streamed).items() if name in names}
    return fitting_codes(shapes, share, every=True)


def saved_parameters(streamed: StreamedModel, ranks: Ranks, stacks: Ranks) -> int:
    """Count the weights that an emulator of these ranks saves."""
    saved = 0
    for name, (count, out_features, in_features) in stack_shapes(streamed).items():
        if (rank := stacks.get(name)) is not None:
            saved += count * (out_features * in_features - kept_values(out_features, in_features, rank))
    for unit in streamed.units:
        for name, module in unit_linears(unit):
            if (rank := ranks.get(name)) is not None:
                out_features, in_features = weight_shape(module)
                saved += out_features * in_features - kept_values(out_features, in_features, rank)
    return saved


def emulator_bytes(
    streamed: StreamedModel,
    ranks: Ranks,
    stacks: Ranks,
    factor_dtype: FactorDtype | None,
    code: CodeShape | None = None,
    stack_code: CodeShape | None = None,
) -> int:
    """Bytes of the weights of an emulator of these ranks; of the residual factors of codes of shape `code`, if given.

    Experts are codes of `stack_code`, if given.
    """
    dtype_bytes = streamed.dtype.itemsize
    total = stored_parameters(streamed) * dtype_bytes
    for name, (count, out_features, in_features) in stack_shapes(streamed).items():
        if name in stacks:
            kept = linear_bytes(out_features, in_features, stacks[name], factor_dtype, dtype_bytes)
            if stack_code is not None and (rank := stacks[name]) is not None:
                kept = coded_bytes(out_features, in_features, stack_code, rank)
            total += count * (kept - dtype_bytes * out_features * in_features)
    for unit in streamed.units:
        for name, module in unit_linears(unit):
            if name in ranks:
                shape = weight_shape(module)
                kept = linear_bytes(*shape, ranks[name], factor_dtype, dtype_bytes)
                if code is not None and (rank := ranks[name]) is not None:
                    kept = coded_bytes(*shape, code, rank)
                total += kept - dtype_bytes * shape[0] * shape[1]
    return total


def stored_parameters(streamed: StreamedModel, blocks_only: bool = False) -> int:
    """Count the parameters of the model, tied ones once; with `blocks_only` those of its repeated layers."""
    names = [name for unit in streamed.units if unit.is_block or not blocks_only for name in unit.parameters]
    names += () if blocks_only else streamed.parameters_outside_units
    return sum(streamed.weights.bare_parameters[name].numel() for name in names if name not in streamed.weights.aliases)


def stacked_parameters(streamed: StreamedModel, but: Collection[str] = ()) -> int:
    """Count the parameters of the repeated layers in stacks of matrices (experts), except the stacks in `but`."""
    names = [name for unit in streamed.units if unit.is_block for name in unit.parameters if name not in but]
    tensors = [streamed.weights.bare_parameters[name] for name in names if name not in streamed.weights.aliases]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim == 3 and len(tensor) > 1)


def coded_workspace(
    streamed: StreamedModel,
    chosen: Choice,
    loads: UnitLoads,
    on_gpu: bool,
    *,
    backward: bool = True,
    inputs: Mapping[int, Sequence[int]] | None = None,
) -> int:
    """Predict what a compile to codes holds in addition to the largest unit, from shapes alone.

    That is what coding a unit takes (`coding_bytes`), and after it one expert at a time; on a host the unit that is
    read ahead, and a reserve. `inputs` are the features of what a unit's linears read, by its position, where it is
    known which read the same.
    """
    head = head_workspace(streamed, loads.most_rows) if backward else 0
    assert chosen.code is not None
    worst, bits = 0, chosen.code.bits
    for unit in streamed.units:
        shapes = [weight_shape(module) for name, module in unit_linears(unit) if name in chosen.linears]
        graph = graph_bytes(loads.values(streamed, unit), streamed.dtype.itemsize, on_gpu)
        ahead = 0 if on_gpu else unit.weight_bytes
        coding = coding_bytes(shapes, graph, head, on_gpu, bits, (inputs or {}).get(unit.position), backward)
        rows, value_bytes = loads.rows(unit), streamed.dtype.itemsize
        experts = [
            _expert_workspace(found, chosen, rows, value_bytes, RESIDUAL_DTYPE, on_gpu)
            for found in stacks_below(unit.name, unit.module)
            if chosen.stacks.keys() & set(found.paths)
        ]
        # A host keeps the moments of the unit's linears, and holes of the graph, while it codes the experts.
        worst = max(worst, ahead + (max([coding, *experts]) if on_gpu else coding + max(experts, default=0)))
    return worst + RESERVE_BYTES


def backward_workspace(streamed: StreamedModel, ranks: Ranks, loads: UnitLoads, on_gpu: bool) -> int:
    """Predict what weighing factors by gradients adds to `compile_workspace`, from shapes alone (`weighing_bytes`)."""
    head = head_workspace(streamed, loads.most_rows)
    worst = 0
    for unit in streamed.units:
        shapes = [weight_shape(module) for name, module in unit_linears(unit) if name in ranks]
        graph = graph_bytes(loads.values(streamed, unit), streamed.dtype.itemsize, on_gpu)
        worst = max(worst, weighing_bytes(shapes, graph, head))
    return worst


def compile_workspace(
    streamed: StreamedModel,
    ranks: Ranks,
    stacks: Ranks,
    loads: UnitLoads,
    factor_dtype: FactorDtype | None,
    keeps_whole: bool,
    on_gpu: bool,
) -> int:
    """Predict what a compile holds in addition to the largest unit, from shapes alone.

    That is what computing the factors of a unit takes (`compiling_bytes`), and a reserve. Of experts the moments of one
    at a time, and on a host what is stored of all. With `keeps_whole` a linear that is quantized is stored as factors
    and whole.
    """
    worst = 0
    for unit in streamed.units:
        experts = [found for found in stacks_below(unit.name, unit.module) if stacks.keys() & set(found.paths)]
        rows, value_bytes = loads.rows(unit), streamed.dtype.itemsize
        chosen = Choice(ranks, stacks)
        in_experts = [_expert_workspace(found, chosen, rows, value_bytes, factor_dtype, on_gpu) for found in experts]
        linears = [
            CompiledShape(*weight_shape(module), ranks[name], value_bytes, factor_dtype, keeps_whole)
            for name, module in unit_linears(unit)
            if name in ranks
        ]
        worst = max(worst, compiling_bytes(linears, rows, unit.weight_bytes, on_gpu, in_experts))
    return worst + RESERVE_BYTES


def _expert_workspace(
    found: ExpertStacks,
    chosen: Choice,
    rows_at_once: int,
    value_bytes: int,
    factor_dtype: FactorDtype | None,
    on_gpu: bool,
) -> int:
    """Predict what one module of experts takes: its routed rows of a batch, or one expert while it is solved.

    Moments come twice, those of the rows that an expert was sent and those of all tokens. What is stored of all experts
    comes once more for the larger stack, which is put together from its parts. From a card it moves to the host, and
    moments are taken of rows in float32.
    """
    ranks, code, stored, solvers = chosen.stacks, chosen.stack_code, [], []
    shapes = [found.shape(leaf)[1:] for leaf in found.leaves]
    for leaf, shape in zip(found.leaves, shapes, strict=True):
        if (path := found.path(leaf)) not in ranks:
            continue
        rank = ranks[path]
        if code is not None and rank is not None:
            solvers.append(coding_bytes([shape], 0, 0, on_gpu, code.bits))
            stored.append(coded_bytes(*shape, code, rank))
        else:
            expert = CompiledShape(*shape, rank, value_bytes, factor_dtype)
            solvers.append(expert.solver_bytes)
            stored.append(expert.stored_bytes)
    sides = [min(shape) for shape in shapes]
    moments = 2 * moment_bytes(sides)
    if code is not None:  # those of the inputs, whatever is narrow
        moments = 2 * sum(8 * columns * group_size(columns) for _, columns in shapes)
    solver, count = max(solvers), found.shape(found.opening)[0]
    rows = EXPERT_ROWS * sum(map(sum, shapes)) * (8 + 8)
    batch = rows_at_once * expert_width(found) * 8
    if on_gpu:
        adding = rows // 2 + adding_bytes(max(sides) if code is None else max(columns for _, columns in shapes))
        return max(moments + max(adding, solver + 2 * max(stored)), batch)
    return max(moments + solver + rows + count * (sum(stored) + max(stored)), batch)
