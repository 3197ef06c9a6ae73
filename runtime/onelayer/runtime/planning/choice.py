"""Chooses factor dtype, ratio and activation storage for a memory budget, from shapes alone; names what limits them."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE
from onelayer.compiler.compile.settings import Form
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import Allocation, rank_for
from onelayer.compiler.factors.stored_forms import FACTOR_DTYPES, INSTALL, FactorDtype, best_of
from onelayer.compiler.results import Result
from onelayer.runtime.planning.coded import LEAST_RATIO, coded_emulator, coded_experts, share_of
from onelayer.runtime.planning.pass_memory import WHOLE, pass_bytes, renewal_bytes
from onelayer.runtime.planning.shapes import LinearShape, ModelShapes
from onelayer.runtime.planning.train_memory import PlannedRun, Stored, TrainMemory, emulator_bytes, train_memory

# The rest is left for the device's own context and for fragmentation in the allocator.
USABLE_SHARE = 0.95
# Factors are considered up to the largest ratio. Above it only whole, rounded weights are.
SMALLEST_RATIO, LARGEST_RATIO, STEPS = 0.01, 0.95, 1000
# An emulator pays if it takes less than this share of its quantized original, which trainers can load packed.
PAYS_BELOW = 0.8
# A more exact way to store activations is chosen only if it leaves this share of the ratio that the most compact one
# allows. An error in the emulator costs more than an error in the backward pass (manifests/LOG.md).
WORTHWHILE = 0.9

EVERY_FORM: tuple[Stored, ...] = (*FACTOR_DTYPES, "coded")

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
    stored: Stored
    ratio: float | None
    memory: TrainMemory

    @property
    def factor_dtype(self) -> FactorDtype:
        """The dtype of factors; with codes that of what the codes leave out."""
        return RESIDUAL_DTYPE if self.stored == "coded" else self.stored

    @property
    def form(self) -> str:
        """The form of the linears as a compile names it."""
        return "coded" if self.stored == "coded" else "factors"

    @property
    def keep_bytes(self) -> float | None:
        """The share of the bytes at 16 bits that codes take; None without codes, or if nothing fits."""
        return round(share_of(self.ratio), 5) if self.stored == "coded" and self.ratio is not None else None

    @property
    def size(self) -> "Size":
        """The size for a compile; a plan's `bf16` is the original's own dtype there."""
        assert self.ratio is not None
        if self.stored == "coded":
            return Size(self.ratio, RESIDUAL_DTYPE, coded=True)
        return Size(self.ratio, None if self.stored == "bf16" else self.stored)

    @property
    def reached(self) -> float:
        """The ratio, 0 if nothing fits."""
        return self.ratio or 0.0


@dataclass(frozen=True)
class Size:
    """The size of an emulator; a dtype of None is the original's own."""

    ratio: float
    factor_dtype: FactorDtype | None
    coded: bool = False

    @property
    def stored(self) -> Stored:
        """How the linears are stored."""
        return "coded" if self.coded else self.factor_dtype or "bf16"

    def compile_settings(self, allocation: Allocation) -> dict[str, Any]:
        """Return the settings of a compile to this size. Ranks of factors are chosen by `allocation`."""
        if self.coded:
            return {"keep_bytes": share_of(self.ratio)}
        return {"ratio": self.ratio, "factor_dtype": self.factor_dtype, "rank_allocation": allocation}


class Alternative(Result):
    """Something to give up, and the largest `ratio` that then fits."""

    give_up: str
    ratio: float


def best_ratio(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int, stored: Stored = "bf16") -> Choice:
    """Find the largest ratio, in thousandths, that keeps training and the streamed passes within the budget.

    It is 1 if all weights fit whole, only rounded. That of codes is below 1: they are better than factors, not than
    whole weights.
    """
    planned = replace(planned, coded=stored == "coded")
    usable = int(budget_bytes * USABLE_SHARE)
    fixed = train_memory(shapes, 0, planned)

    def fits(ratio: float) -> bool:
        memory = replace(fixed, emulator=emulator_bytes(shapes, ratio, stored))
        held = [*pass_bytes(shapes, ratio, planned).values(), memory.peak]
        return max(*held, renewal_bytes(shapes, memory, planned) if planned.anchored else 0) <= usable

    least = math.ceil(LEAST_RATIO * STEPS) if planned.coded else round(SMALLEST_RATIO * STEPS)
    low, high = least, STEPS - 1 if planned.coded else round(LARGEST_RATIO * STEPS)
    largest = WHOLE if largest_ratio(planned, stored) == WHOLE and fits(WHOLE) else None
    while largest != WHOLE and low <= high:
        middle = (low + high) // 2
        if fits(middle / STEPS):
            largest, low = middle / STEPS, middle + 1
        else:
            high = middle - 1
    if planned.coded and largest is not None:  # in small models not every size leaves ranks for all linears
        steps = range(round(largest * STEPS), least - 1, -1)
        largest = next((step / STEPS for step in steps if coded_emulator(shapes, step / STEPS) is not None), None)
    held = emulator_bytes(shapes, least / STEPS if largest is None else largest, stored)
    return Choice(planned, stored, largest, replace(fixed, emulator=held))


def largest_ratio(planned: PlannedRun, stored: Stored) -> float:
    """Return the largest ratio to consider. A whole emulator in the original's own dtype would be a copy of it."""
    if stored == "coded":
        return (STEPS - 1) / STEPS
    return LARGEST_RATIO if stored == "bf16" or planned.is_sliced else WHOLE


def activation_choices(planned: PlannedRun) -> list[PlannedRun]:
    """List the ways to store activations, the most exact first."""
    shares = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
    compressed = [replace(planned, where="sublayer", rank=share) for share in shares]
    coarse = [replace(planned, where="layer", rank=share) for share in shares[2:]]
    return [replace(planned, where="none", rank=None), *compressed, *coarse]


def choose(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int, stored: Stored = "bf16") -> Choice:
    """Choose the most exact way to store activations that leaves nearly as large a ratio as any other.

    If int8 can keep every weight whole, never choose a setting that drops some: the loss would exceed all rounding
    error (manifests/LOG.md, int8 that keeps all).
    """
    choices = [best_ratio(shapes, way, budget_bytes, stored) for way in activation_choices(planned)]
    best = max(choice.reached for choice in choices)
    if not best:
        return min(choices, key=lambda choice: choice.memory.peak)
    enough = best if best == WHOLE and stored == "int8" else WORTHWHILE * best
    return next(choice for choice in choices if choice.reached >= enough)


def choose_each(shapes: ModelShapes, planned: PlannedRun, budget_bytes: int) -> dict[Stored, Choice]:
    """Choose for every way to store linears: the factor dtypes, those that round the least first, and codes."""
    return {stored: choose(shapes, planned, budget_bytes, stored) for stored in EVERY_FORM}


def best_stored(ratios: Mapping[Stored, float | None]) -> Stored:
    """Choose how to store linears by the ratio that each way affords.

    Codes go before factors of their residuals' dtype that do not keep all (manifests/LOG.md, the recipe of codes).
    """
    dtype = best_of({each: ratio for each, ratio in ratios.items() if each != "coded"})
    affords_codes = ratios.get("coded") is not None and dtype == RESIDUAL_DTYPE and ratios.get(dtype) != WHOLE
    return "coded" if affords_codes else dtype


def chosen_form(choices: Mapping[Stored, Choice], factor_dtype: FactorDtype | None, form: Form) -> Stored:
    """Choose how linears are stored, among what was asked for."""
    if form == "coded":
        if factor_dtype not in (None, RESIDUAL_DTYPE):
            raise InputError(f"--factor-dtype {factor_dtype}: codes leave their rest to {RESIDUAL_DTYPE} factors")
        return "coded"
    if factor_dtype is not None:
        return factor_dtype
    allowed: tuple[Stored, ...] = FACTOR_DTYPES if form == "factors" else EVERY_FORM
    return best_stored({stored: choices[stored].ratio for stored in allowed})


def limiting_pass(shapes: ModelShapes, choice: Choice, budget_bytes: int) -> str:
    """Name what prevents a larger ratio, in one sentence: of several passes that would not fit, the largest."""
    if choice.reached == WHOLE:
        return f"nothing: all weights fit whole, rounded to {choice.factor_dtype}"
    end = largest_ratio(choice.planned, choice.stored)
    if choice.reached >= end:
        return "nothing: an emulator near the size of the original fits"
    least = LEAST_RATIO if choice.stored == "coded" else SMALLEST_RATIO
    ratio = least if choice.ratio is None else choice.ratio + 1 / STEPS
    if ratio > LARGEST_RATIO and choice.stored != "coded":
        ratio = end
    memory = choice.memory
    passes = pass_bytes(shapes, ratio, choice.planned)
    largest_pass = max(passes, key=lambda name: passes[name])
    larger = replace(memory, emulator=emulator_bytes(shapes, ratio, choice.stored))
    train_bytes = larger.peak
    if choice.planned.anchored and renewal_bytes(shapes, larger, choice.planned) > max(train_bytes, *passes.values()):
        return "train: a layer of the original and its batch, in addition to the emulator, where anchors are renewed"
    if passes[largest_pass] > max(train_bytes, int(budget_bytes * USABLE_SHARE)):
        return f"{largest_pass}: {LIMITS[largest_pass]}"
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
    planned, stored = choice.planned, choice.stored
    offers: list[tuple[str, PlannedRun, Stored]] = []
    if planned.batch_size > 1:
        smaller = max(1, planned.batch_size // 2)
        offers.append((f"--batch-size {smaller}", replace(planned, batch_size=smaller), stored))
        offers.append(("--batch-size 1", replace(planned, batch_size=1), stored))
    if planned.max_length > 256 and shapes.positions is None:
        shorter = planned.max_length // 2
        offers.append((f"--max-length {shorter}", replace(planned, max_length=shorter), stored))
    if stored != "coded":
        offers += [(f"factors of full precision, for {dtype}", planned, dtype) for dtype in ("int8", "nf4")]
    ratios = {text: choose(shapes, way, budget_bytes, each).reached for text, way, each in offers}
    rows = [Alternative(give_up=text, ratio=ratio) for text, ratio in ratios.items() if ratio > choice.reached]
    return sorted(rows, key=lambda row: -row.ratio)


def median_rank(shapes: ModelShapes, choice: Choice) -> int:
    """Return the median rank over the linears. Linears that stay dense count with their full rank."""
    codes = coded_emulator(shapes, choice.reached) if choice.stored == "coded" else None

    def rank(linear: LinearShape) -> int:
        full = min(linear.out_features, linear.in_features)
        if codes is not None:
            return codes.rank(linear) or full
        return rank_for(choice.reached, linear.out_features, linear.in_features) or full

    return int(median(rank(linear) for block in shapes.blocks for linear in block.compressible))


def remarks(shapes: ModelShapes, choice: Choice, max_length: int, memory_bytes: int) -> list[str]:
    """List the remarks that a reader needs in addition to the figures."""
    remarks = []
    if shapes.media is not None and shapes.media.count * shapes.media.tokens >= max_length:
        tokens = shapes.media.count * shapes.media.tokens
        remarks.append(f"the images or sound of an example take up to {tokens} tokens: raise --max-length above that")
    whole = choice.memory.peak - choice.memory.emulator + shapes.unpacked_bytes
    if whole <= memory_bytes:
        remarks.append("the original itself fits: LoRA can be trained on it directly, without an emulator")
    if choice.ratio is not None and shapes.packed_bytes is not None:
        emulator = emulator_bytes(shapes, choice.ratio, choice.stored)
        if emulator > PAYS_BELOW * shapes.packed_bytes:
            remarks.append(
                f"an emulator does not pay: it takes {emulator / shapes.packed_bytes:.0%} of what the quantized "
                "original takes itself; train on that packed (QLoRA), or plan with less memory"
            )
    if stacked := sum(block.experts.parameters for block in shapes.blocks if block.experts):
        share, coded = stacked / shapes.parameters, choice.stored == "coded"
        form = "codes" if coded and coded_experts(shapes, choice.reached) is not None else "factors"
        remarks.append(
            f"{share:.0%} of the parameters are experts, which are counted as {form}; of a class that does not answer "
            "to transformers' experts interface they stay as they are"
        )
    if choice.ratio is not None and choice.ratio < 0.15 and choice.stored != "coded":
        remarks.append("below a ratio of 0.15 little of what is learned reaches the original; polish the adapter")
    if choice.stored == "coded":
        remarks.append("an emulator of codes cannot be sliced; with --form factors it can")
    if choice.factor_dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        remarks.append(f"bitsandbytes is missing here: {INSTALL}")
    if choice.ratio == LARGEST_RATIO:
        remarks.append(f"{LARGEST_RATIO} is the largest ratio of factors that is considered")
    return remarks
