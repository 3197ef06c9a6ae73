"""Chooses factor dtype, ratio and activation storage for a memory budget, from shapes alone; names what limits them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import get_args

from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.results import Result
from onelayer.runtime.planning.pass_memory import pass_bytes
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.train_memory import PlannedRun, TrainMemory, emulator_bytes, train_memory

# The rest is left for the device's own context and for fragmentation in the allocator.
USABLE_SHARE = 0.95
# Factors are considered up to the largest ratio. Above it only whole, rounded weights are.
SMALLEST_RATIO, LARGEST_RATIO, STEPS, WHOLE = 0.01, 0.95, 1000, 1.0
# A more exact way to store activations is chosen only if it leaves this share of the ratio that the most compact one
# allows. An error in the emulator costs more than an error in the backward pass (manifests/LOG.md).
WORTHWHILE = 0.9


# The largest part of what each pass holds.
LIMITS = {
    "compile": "the largest layer with its moments and solver, or its batch",
    "correct": "the factors of the largest linear, or the largest layer with what is scored",
    "refine": "the factors of the largest layer as they are trained, or their batch",
}


@dataclass(frozen=True)
class Choice:
    """A planned run, the largest ratio that fits (None if none does), and the bytes."""

    planned: PlannedRun
    factor_dtype: FactorDtype
    ratio: float | None
    memory: TrainMemory

    @property
    def reached(self) -> float:
        """The ratio, 0 if nothing fits."""
        return self.ratio or 0.0


class Alternative(Result):
    """Something to give up, and the largest `ratio` that then fits."""

    give_up: str
    ratio: float


def best_ratio(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int, dtype: FactorDtype = "bf16") -> Choice:
    """Find the largest ratio, in thousandths, that keeps training and the streamed passes within the budget.

    It is 1 if all weights fit whole, only rounded.
    """
    usable = int(budget_bytes * USABLE_SHARE)
    fixed = train_memory(shapes, 0, planned)

    def fits(ratio: float) -> bool:
        passes = pass_bytes(shapes, ratio, planned)
        return max(*passes.values(), fixed.peak + emulator_bytes(shapes, ratio, dtype)) <= usable

    low, high = round(SMALLEST_RATIO * STEPS), round(LARGEST_RATIO * STEPS)
    largest = WHOLE if largest_ratio(planned, dtype) == WHOLE and fits(WHOLE) else None
    while largest != WHOLE and low <= high:
        middle = (low + high) // 2
        if fits(middle / STEPS):
            largest, low = middle / STEPS, middle + 1
        else:
            high = middle - 1
    held = emulator_bytes(shapes, SMALLEST_RATIO if largest is None else largest, dtype)
    return Choice(planned, dtype, largest, replace(fixed, emulator=held))


def largest_ratio(planned: PlannedRun, dtype: FactorDtype) -> float:
    """Return the largest ratio to consider. A whole emulator in the original's own dtype would be a copy of it."""
    return LARGEST_RATIO if dtype == "bf16" or planned.is_sliced else WHOLE


def activation_choices(planned: PlannedRun) -> list[PlannedRun]:
    """List the ways to store activations, the most exact first."""
    shares = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
    compressed = [replace(planned, where="sublayer", rank=share) for share in shares]
    coarse = [replace(planned, where="layer", rank=share) for share in shares[2:]]
    return [replace(planned, where="none", rank=None), *compressed, *coarse]


def choose(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int, dtype: FactorDtype = "bf16") -> Choice:
    """Choose the most exact way to store activations that leaves nearly as large a ratio as any other.

    If int8 can keep every weight whole, never choose a setting that drops some: the loss would exceed all rounding
    error (manifests/LOG.md, int8 that keeps all).
    """
    choices = [best_ratio(shapes, way, budget_bytes, dtype) for way in activation_choices(planned)]
    best = max(choice.reached for choice in choices)
    if not best:
        return min(choices, key=lambda choice: choice.memory.peak)
    enough = best if best == WHOLE and dtype == "int8" else WORTHWHILE * best
    return next(choice for choice in choices if choice.reached >= enough)


def choose_each(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int) -> dict[FactorDtype, Choice]:
    """Choose for every factor dtype, those that round the least first."""
    dtypes: tuple[FactorDtype, ...] = get_args(FactorDtype)
    return {dtype: choose(shapes, planned, budget_bytes, dtype) for dtype in dtypes}


def compile_dtype(dtype: FactorDtype) -> FactorDtype | None:
    """Return the dtype that `compile` takes. A plan's `bf16` becomes None, the original's own dtype."""
    return None if dtype == "bf16" else dtype


def limiting_pass(shapes: ModelShapes, choice: Choice, budget_bytes: int) -> str:
    """Name what prevents a larger ratio, in one sentence."""
    if choice.reached == WHOLE:
        return f"nothing: all weights fit whole, rounded to {choice.factor_dtype}"
    end = largest_ratio(choice.planned, choice.factor_dtype)
    if choice.reached >= end:
        return "nothing: an emulator near the size of the original fits"
    ratio = SMALLEST_RATIO if choice.ratio is None else choice.ratio + 1 / STEPS
    if ratio > LARGEST_RATIO:
        ratio = end
    usable = int(budget_bytes * USABLE_SHARE)
    passes = pass_bytes(shapes, ratio, choice.planned)
    largest_pass = max(passes, key=lambda name: passes[name])
    if passes[largest_pass] > usable:
        return f"{largest_pass}: {LIMITS[largest_pass]}"
    memory = choice.memory
    moments = {
        "the emulator's weights": memory.emulator,
        "saved activations": memory.saved,
        "the loss": memory.loss if memory.loss >= memory.recompute else 0,
        "one layer's backward pass": memory.recompute if memory.recompute > memory.loss else 0,
        "the adapter and its optimizer": memory.adapter,
    }
    largest = sorted(moments.items(), key=lambda item: -item[1])[:2]
    return "train: " + " and ".join(f"{name} ({size / (1 << 30):.2f} GiB)" for name, size in largest)


def alternatives(shapes: ModelShapes, choice: Choice, budget_bytes: int) -> list[Alternative]:
    """List what could be given up for a larger ratio and what each would gain, the most useful first."""
    planned, stored = choice.planned, choice.factor_dtype
    offers: list[tuple[str, PlannedRun, FactorDtype]] = []
    if planned.batch_size > 1:
        smaller = max(1, planned.batch_size // 2)
        offers.append((f"--batch-size {smaller}", replace(planned, batch_size=smaller), stored))
        offers.append(("--batch-size 1", replace(planned, batch_size=1), stored))
    if planned.max_length > 256:
        shorter = planned.max_length // 2
        offers.append((f"--max-length {shorter}", replace(planned, max_length=shorter), stored))
    offers += [(f"factors of full precision, for {dtype}", planned, dtype) for dtype in ("int8", "nf4")]
    ratios = {text: choose(shapes, way, budget_bytes, dtype).reached for text, way, dtype in offers}
    rows = [Alternative(give_up=text, ratio=ratio) for text, ratio in ratios.items() if ratio > choice.reached]
    return sorted(rows, key=lambda row: -row.ratio)


def median_rank(shapes: ModelShapes, ratio: float) -> int:
    """Return the median rank over the linears. Linears that stay dense count with their full rank."""
    return int(median(_ranks(shapes, ratio)))


def _ranks(shapes: ModelShapes, ratio: float) -> Iterable[int]:
    for block in shapes.blocks:
        for linear in block.compressible:
            full = min(linear.out_features, linear.in_features)
            yield rank_for(ratio, linear.out_features, linear.in_features) or full
