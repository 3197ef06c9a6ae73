"""Predicts what training and compiling hold at their peaks, from shapes and settings. Torch-free.

Every figure counts what the passes allocate, so tests compare it with a count of live tensors. T is the number of
tokens of one batch; the other letters are those of `sub_blocks.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from onelayer.compiler.codes.forms import RESIDUAL_DTYPE
from onelayer.compiler.factors.ranks import Allocation, rank_for, widest_ratio
from onelayer.compiler.factors.stored_forms import (
    RESIDUAL_BITS,
    FactorDtype,
    bytes_per_value,
    factored_bytes,
    is_factored,
    kept_values,
)
from onelayer.compiler.machine.primitives import primitive_bytes
from onelayer.runtime.planning.coded import coded_emulator, coded_experts, largest_decoding_bytes
from onelayer.runtime.planning.shapes import BlockShape, LinearShape, ModelShapes
from onelayer.runtime.planning.sub_blocks import MASTER_BYTES, SubBlock, expert_parts, lora_parameters, sub_blocks
from onelayer.runtime.training.settings import TrainSettings

# How the linears of an emulator are stored: as factors of a dtype, or as codes.
Stored = FactorDtype | Literal["coded"]
FACTOR_BYTES: dict[FactorDtype, float] = {kind: bytes_per_value(kind) for kind in get_args(FactorDtype)}
# TRL computes the loss in tiles of logits of this size: in one kernel on a GPU, elsewhere with seven temporaries.
TILE_TOKENS, TILE_VOCABULARY, TILE_TEMPORARY_BYTES = 4096, 32768, 28.5


@dataclass(frozen=True)
class PlannedRun:
    """All that the planner knows of a run.

    `rank` is the share of the hidden width that stored activations keep; None stores them whole. `allocation` is how
    the emulator's ranks are chosen. An emulator that `is_sliced` into smaller ones cannot keep its weights whole. Three
    fields are the tokens that a pass over the original has on the device at once. For compile and refine None means one
    example. `refine_tokens` is 0 if factors are not refined, `scored_tokens` is 0 if no held-out text chooses the
    correction. `coded`: the emulator consists of codes. `refine_backward`: a refinement learns gradients too.
    `compile_backward`: factors are weighted by gradients. `anchored`: the original streams by while training.
    """

    batch_size: int
    max_length: int
    lora_rank: int = TrainSettings.default("lora_rank")
    where: Literal["none", "layer", "sublayer"] = "none"
    rank: float | None = None
    on_gpu: bool = True
    allocation: Allocation = "spectrum"
    is_sliced: bool = False
    compile_tokens: int | None = None
    refine_tokens: int | None = None
    scored_tokens: int = 0
    coded: bool = False
    refine_backward: bool = False
    compile_backward: bool = False
    anchored: bool = False

    def widest(self, ratio: float) -> float:
        """Return the ratio at which a compile computes factors."""
        return ratio if self.coded else widest_ratio(ratio, self.allocation)

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.max_length


def factor_bytes(shapes: ModelShapes, dtype: FactorDtype) -> float:
    """Return bytes per value of a factor; an unquantized one has the model's own dtype."""
    return shapes.value_bytes if dtype == "bf16" else FACTOR_BYTES[dtype]


def emulator_bytes(shapes: ModelShapes, ratio: float, stored: Stored = "bf16") -> int:
    """Predict the size of an emulator, in memory and on disk. With quantized factors, dense linears are quantized too.

    Experts count as factors, or as codes if they are large enough: headers cannot say whether their class supports
    transformers' experts interface.
    """
    per_value = factor_bytes(shapes, RESIDUAL_DTYPE if stored == "coded" else stored)
    codes = coded_emulator(shapes, ratio) if stored == "coded" else None
    linears = [(linear, count) for block, count in shapes.kinds for linear in block.compressible]
    stacks = [
        (stack, count * block.experts.count)
        for block, count in shapes.kinds
        if block.experts is not None
        for stack in block.experts.stacks
    ]
    whole = sum(count * linear.parameters for linear, count in [*linears, *stacks])
    experts = None if codes is None else coded_experts(shapes, ratio)
    if experts is None:
        kept = sum(count * values_at(stack, ratio) for stack, count in stacks) * per_value
    else:
        kept = sum(count * experts.stored_bytes(stack) for stack, count in stacks)
    if codes is None:
        kept += sum(count * values_at(linear, ratio) for linear, count in linears) * per_value
    else:
        kept += sum(count * codes.stored_bytes(linear) for linear, count in linears)
    return int((shapes.parameters - whole) * shapes.value_bytes + kept)


def active_values(shapes: ModelShapes, ratio: float, coded: bool = False) -> int:
    """Count the emulator's weights that compute one token, whatever their size in bytes. Decoded ones count whole."""
    codes = coded_emulator(shapes, ratio) if coded else None
    experts = None if codes is None else coded_experts(shapes, ratio)
    spared = 0
    for block, count in shapes.kinds:
        active = 0 if block.experts is None else min(shapes.experts_per_token, block.experts.count)
        for linears, form, times in ((block.compressible, codes, 1), (block.stacks, experts, active)):
            kept = (values_at(linear, ratio) if form is None else form.computed_values(linear) for linear in linears)
            spared += count * times * (sum(linear.parameters for linear in linears) - sum(kept))
    return shapes.active_parameters - spared


def factor_values(shapes: ModelShapes, ratio: float) -> int:
    """Count those of `active_values` that are in low-rank factors; other weights are whole."""
    found = 0
    for block, count in shapes.kinds:
        active = 0 if block.experts is None else min(shapes.experts_per_token, block.experts.count)
        for linears, times in ((block.compressible, 1), (block.stacks, active)):
            kept = ((linear.parameters, values_at(linear, ratio)) for linear in linears)
            found += count * times * sum(values for whole, values in kept if values < whole)
    return found


def expert_factor_bytes(shapes: ModelShapes, ratio: float) -> int:
    """Predict the bytes of the largest block's expert factors, which are gathered on the host."""
    return shapes.value_bytes * max(
        block.experts.count * sum(values_at(stack, ratio) for stack in block.experts.stacks) if block.experts else 0
        for block, _ in shapes.kinds
    )


def values_at(linear: LinearShape, ratio: float) -> int:
    """Count the values of a linear's factors, or of its weight if that is smaller."""
    rank = rank_for(ratio, linear.out_features, linear.in_features)
    return kept_values(linear.out_features, linear.in_features, rank)


@dataclass(frozen=True)
class TrainMemory:
    """Bytes of one training step by purpose."""

    emulator: int
    adapter: int
    saved: int
    loss: int
    recompute: int
    optimizer: int
    kernels: int = 0

    @property
    def peak(self) -> int:
        """The largest of three moments: the loss, the backward pass of one layer, the optimizer's step."""
        return (
            self.emulator
            + self.adapter
            + self.kernels
            + max(self.saved + max(self.loss, self.recompute), self.optimizer)
        )


def train_memory(shapes: ModelShapes, emulator: int, planned: PlannedRun) -> TrainMemory:
    """Predict what LoRA on every linear holds while it trains on a model of `emulator` bytes."""
    layers = LayerBytes(shapes, planned)
    parameters = lora_parameters(shapes, planned.lora_rank)
    tile = min(planned.tokens, TILE_TOKENS)
    values = min(shapes.vocabulary, TILE_VOCABULARY) * (0 if planned.on_gpu else TILE_TEMPORARY_BYTES)
    # A class without a vocabulary head computes its loss over a few labels.
    head = tile * (TILE_VOCABULARY * shapes.value_bytes + values) if shapes.has_vocabulary_head else 0
    # Held around the loss: the final norm and its gradient; with sub-layers also the inputs of the first norms.
    outside = planned.tokens * shapes.hidden * (2 * MASTER_BYTES + 2 * shapes.value_bytes)
    outside += 3 * planned.tokens * shapes.hidden * shapes.value_bytes if planned.where == "sublayer" else 0
    return TrainMemory(
        emulator=emulator,
        adapter=3 * MASTER_BYTES * parameters,  # weights and the two moments of AdamW
        saved=sum(count * layers.stored(block) for block, count in shapes.kinds),
        loss=int(head + outside),
        recompute=max(layers.backward(block) for block, _ in shapes.kinds)
        + (largest_decoding_bytes(shapes) if planned.coded else 0),
        optimizer=3 * MASTER_BYTES * parameters,  # gradients, and the step's temporaries
        kernels=primitive_bytes(shapes.value_bytes, planned.on_gpu),
    )


@dataclass(frozen=True)
class LayerBytes:
    """The bytes that a block keeps for its backward pass, and those that this pass holds in addition."""

    shapes: ModelShapes
    planned: PlannedRun

    @cached_property
    def copy_bytes(self) -> int | None:
        """The bytes per value of the copy that an adapter makes of its input in half precision; None if it makes none.

        On a GPU autocast makes it in half precision. On a CPU there is no autocast, and PEFT makes it in float32.
        """
        if self.shapes.value_bytes != 2:
            return None
        return self.shapes.value_bytes if self.planned.on_gpu else MASTER_BYTES

    def stored(self, block: BlockShape) -> int:
        """Count the bytes kept from forward to backward."""
        parts, rows = sub_blocks(block), block.rows(self.planned.tokens)
        if self.planned.where == "none" or block.projects:
            return self._exact(block, parts)
        copy = stored_copy_bytes(rows, block.hidden, self.planned.rank, self.shapes.value_bytes)
        if self.planned.where == "layer":
            return copy
        return len(parts) * (copy + MASTER_BYTES * rows)

    def backward(self, block: BlockShape) -> int:
        """Count the bytes of what is recomputed, if anything is, and of the gradients of the widest sub-block."""
        parts, hidden, rows = sub_blocks(block), block.hidden, block.rows(self.planned.tokens)
        inner = max([expert_parts(self.shapes, block)[1], *(part.inner for part in parts)])
        gradients = rows * ((6 if self.copy_bytes else 2 * self.shapes.value_bytes) * inner + 8 * hidden)
        if self.planned.where == "none" or block.projects:
            return gradients
        if self.planned.where == "layer":
            return gradients + self._exact(block, parts) + rows * hidden * self.shapes.value_bytes
        return gradients + max((self._exact(block, (part,)) for part in parts), default=0)

    def _exact(self, block: BlockShape, parts: tuple[SubBlock, ...]) -> int:
        per_token = sum(
            part.saved_per_token(self.shapes.value_bytes, self.planned.lora_rank, self.copy_bytes) for part in parts
        )
        opened, inner = expert_parts(self.shapes, block)
        per_token += self.shapes.value_bytes * (opened + inner)
        if inner:  # each expert's output until it is weighted, and the order of rows three times
            per_token += self.shapes.experts_per_token * (self.shapes.value_bytes * block.hidden + 3 * 8)
        return block.rows(self.planned.tokens) * per_token


def stored_copy_bytes(tokens: int, features: int, share: float | None, value_bytes: int) -> int:
    """Count the bytes of one compressed (T, n) matrix, or of the matrix itself if that is smaller."""
    exact = tokens * features * value_bytes
    if share is None:
        return exact
    rank = max(1, round(share * features))
    if not is_factored(tokens, features, rank, RESIDUAL_BITS, exact):
        return exact
    return factored_bytes(tokens, features, rank, RESIDUAL_BITS)
