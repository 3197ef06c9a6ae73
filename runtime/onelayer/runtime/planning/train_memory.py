"""Shapes and settings in, predicted bytes out: what training and compiling hold at their peaks. Torch-free.

Everything is counted from what the passes allocate, so it can be compared with a count of live tensors; tests do. Rows
T are tokens of one batch; the letters of `plan_parts` hold.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from onelayer.compiler.factors.ranks import Allocation, rank_for, widest_ratio
from onelayer.compiler.factors.stored_forms import (
    RESIDUAL_BITS,
    FactorDtype,
    bytes_per_value,
    factored_bytes,
    is_factored,
    kept_values,
)
from onelayer.runtime.planning.shapes import BlockShape, LinearShape, ModelShapes
from onelayer.runtime.planning.sub_blocks import MASTER_BYTES, SubBlock, expert_parts, lora_parameters, sub_blocks
from onelayer.runtime.training.settings import TrainSettings

FACTOR_BYTES: dict[FactorDtype, float] = {kind: bytes_per_value(kind) for kind in get_args(FactorDtype)}
# TRL computes the loss in tiles of logits this long and wide; on a GPU in one kernel, elsewhere with seven temporaries.
TILE_TOKENS, TILE_VOCABULARY, TILE_TEMPORARY_BYTES = 4096, 32768, 28.5


@dataclass(frozen=True)
class PlannedRun:
    """How training runs. `rank` is the share of the hidden width kept of stored activations; None stores them whole.

    `allocation` is how the emulator's ranks are chosen; where it `is_cut` into smaller ones, its weights cannot stay
    whole. The last three are tokens that passes over the original have on the device at once: of compile and refine one
    example where nothing is said, of refine 0 where factors are not refined, of a correction 0 where no held-out text
    chooses it.
    """

    batch_size: int
    max_length: int
    lora_rank: int = TrainSettings.default("lora_rank")
    where: Literal["none", "layer", "sublayer"] = "none"
    rank: float | None = None
    on_gpu: bool = True
    allocation: Allocation = "spectrum"
    is_cut: bool = False
    compile_tokens: int | None = None
    refine_tokens: int | None = None
    scored_tokens: int = 0

    def widest(self, ratio: float) -> float:
        """The ratio at which a compile computes factors."""
        return widest_ratio(ratio, self.allocation)

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.max_length


def factor_bytes(shapes: ModelShapes, dtype: FactorDtype) -> float:
    """Return the bytes per value of a factor; an unquantized one has the model's own dtype."""
    return shapes.value_bytes if dtype == "bf16" else FACTOR_BYTES[dtype]


def emulator_bytes(shapes: ModelShapes, ratio: float, dtype: FactorDtype = "bf16") -> int:
    """Count the bytes of an emulator, in memory and on the disk. If factors are quantized, so are linears kept dense.

    Experts count as factors: headers cannot say whether their class answers to transformers' experts interface.
    """
    per_value = factor_bytes(shapes, dtype)
    linears = [(linear, count) for block, count in shapes.kinds for linear in block.compressible]
    linears += [
        (stack, count * block.experts.count)
        for block, count in shapes.kinds
        if block.experts is not None
        for stack in block.experts.stacks
    ]
    whole = sum(count * linear.parameters for linear, count in linears)
    kept = sum(count * values_at(linear, ratio) for linear, count in linears)
    return int((shapes.parameters - whole) * shapes.value_bytes + kept * per_value)


def active_values(shapes: ModelShapes, ratio: float) -> int:
    """Count the weights of an emulator that take part in computing one token, however many bytes each takes."""
    spared = 0
    for block, count in shapes.kinds:
        linears = [(linear, 1) for linear in block.compressible]
        if block.experts is not None:
            active = min(shapes.experts_per_token, block.experts.count)
            linears += [(stack, active) for stack in block.experts.stacks]
        spared += count * sum(times * (linear.parameters - values_at(linear, ratio)) for linear, times in linears)
    return shapes.active_parameters - spared


def expert_factor_bytes(shapes: ModelShapes, ratio: float) -> int:
    """Count the bytes of the experts' factors in the block that has most; they are gathered on the host."""
    return shapes.value_bytes * max(
        block.experts.count * sum(values_at(stack, ratio) for stack in block.experts.stacks) if block.experts else 0
        for block, _ in shapes.kinds
    )


def values_at(linear: LinearShape, ratio: float) -> int:
    """Count the values of its factors, or of its weight where that is smaller."""
    rank = rank_for(ratio, linear.out_features, linear.in_features)
    return kept_values(linear.out_features, linear.in_features, rank)


@dataclass(frozen=True)
class TrainMemory:
    """Bytes of one training step by what they are for; `peak` is the fullest moment."""

    emulator: int
    adapter: int
    saved: int
    loss: int
    recompute: int
    optimizer: int

    @property
    def peak(self) -> int:
        """The fullest of three moments: the loss, the backward pass of one layer, the optimizer's step."""
        return self.emulator + self.adapter + max(self.saved + max(self.loss, self.recompute), self.optimizer)


def train_memory(shapes: ModelShapes, emulator: int, planned: PlannedRun) -> TrainMemory:
    """Predict what LoRA on every linear holds while it trains on a model of `emulator` bytes."""
    layers = LayerBytes(shapes, planned)
    parameters = lora_parameters(shapes, planned.lora_rank)
    tile = min(planned.tokens, TILE_TOKENS)
    values = min(shapes.vocabulary, TILE_VOCABULARY) * (0 if planned.on_gpu else TILE_TEMPORARY_BYTES)
    # A class without a head to the vocabulary has its loss over a few labels.
    head = tile * (TILE_VOCABULARY * shapes.value_bytes + values) if shapes.has_vocabulary_head else 0
    # Around the loss: final norm, its gradient; in sub-layers also what the first norms read.
    outside = planned.tokens * shapes.hidden * (2 * MASTER_BYTES + 2 * shapes.value_bytes)
    outside += 3 * planned.tokens * shapes.hidden * shapes.value_bytes if planned.where == "sublayer" else 0
    return TrainMemory(
        emulator=emulator,
        adapter=3 * MASTER_BYTES * parameters,  # values and two moments of AdamW
        saved=sum(count * layers.stored(block) for block, count in shapes.kinds),
        loss=int(head + outside),
        recompute=max(layers.backward(block) for block, _ in shapes.kinds),
        optimizer=3 * MASTER_BYTES * parameters,  # gradients, and the step's temporaries
    )


@dataclass(frozen=True)
class LayerBytes:
    """What a block keeps for its backward pass, and what that pass holds in addition."""

    shapes: ModelShapes
    planned: PlannedRun

    @cached_property
    def autocast(self) -> bool:
        """A model in half precision is trained under autocast."""
        return self.shapes.value_bytes == 2

    def stored(self, block: BlockShape) -> int:
        """Count what is kept from forward to backward."""
        parts = sub_blocks(block, self.shapes.hidden)
        if self.planned.where == "none":
            return self._exact(block, parts)
        copy = stored_copy_bytes(self.planned.tokens, self.shapes.hidden, self.planned.rank, self.shapes.value_bytes)
        if self.planned.where == "layer":
            return copy
        return len(parts) * (copy + MASTER_BYTES * self.planned.tokens)

    def backward(self, block: BlockShape) -> int:
        """Count what is recomputed, if anything is, and the gradients of the widest sub-block."""
        parts, hidden = sub_blocks(block, self.shapes.hidden), self.shapes.hidden
        inner = max([expert_parts(self.shapes, block)[1], *(part.inner for part in parts)])
        gradients = self.planned.tokens * ((6 if self.autocast else 2 * self.shapes.value_bytes) * inner + 8 * hidden)
        if self.planned.where == "none":
            return gradients
        if self.planned.where == "layer":
            return gradients + self._exact(block, parts) + self.planned.tokens * hidden * self.shapes.value_bytes
        return gradients + max(self._exact(block, (part,)) for part in parts)

    def _exact(self, block: BlockShape, parts: tuple[SubBlock, ...]) -> int:
        per_token = sum(
            part.saved_per_token(self.shapes.value_bytes, self.planned.lora_rank, self.autocast) for part in parts
        )
        opened, inner = expert_parts(self.shapes, block)
        per_token += self.shapes.value_bytes * (opened + inner)
        if inner:  # what each expert answers, until it is weighted, and the order of rows three times
            per_token += self.shapes.experts_per_token * (self.shapes.value_bytes * self.shapes.hidden + 3 * 8)
        return self.planned.tokens * per_token


def stored_copy_bytes(tokens: int, features: int, share: float | None, value_bytes: int) -> int:
    """Count a (T, n) matrix as `activation_factors.compress` stores it, or as it is if that is not smaller."""
    exact = tokens * features * value_bytes
    if share is None:
        return exact
    rank = max(1, round(share * features))
    if not is_factored(tokens, features, rank, RESIDUAL_BITS, exact):
        return exact
    return factored_bytes(tokens, features, rank, RESIDUAL_BITS)
