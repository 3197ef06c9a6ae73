"""Formulas for the memory of a correction, torch-free; planner and pass share them. Everything is in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

# A correction reads weights by rows, in chunks of about this size, and widens them by blocks that stay in a core's
# cache, which triples the speed. It works on several linears at once.
CHUNK_BYTES = 8 << 20
BLOCK_BYTES = 1 << 20
LINEARS_AT_ONCE = 3


def trial_bytes(candidates: int, sides: int, unit_factors: Sequence[Sequence[int]], on_gpu: bool) -> int:
    """Bound what the trials of a correction hold in addition to the stream that scores them.

    `sides`: inputs and outputs of all adapted linears, each times the adapter's rank. Every adapted linear has p, b and
    two errors; one unit at a time has the candidates. `unit_factors`: by unit, how many values the emulator's factors
    of each linear have. All of a unit's are read to the host; those of one linear are copied to float32, twice.
    """
    read = 0 if on_gpu else 4 * max(map(sum, unit_factors), default=0)
    copied = 2 * 4 * max((max(values, default=0) for values in unit_factors), default=0)
    return 8 * (4 + candidates) * sides + read + copied


@dataclass(frozen=True)
class CorrectedShape:
    """An adapted linear that is compressed: its sides, the emulator's rank, the adapter's, and its stored weight.

    `is_plain`: the checkpoint stores the weight as one tensor, so it can be read by rows.
    """

    out_features: int
    in_features: int
    rank: int
    lora_rank: int
    weight_bytes: int
    is_plain: bool = True

    @property
    def working_bytes(self) -> int:
        """Bound what computing its gap holds.

        Its factors in their dtype and in float32, a chunk of its weight and the next one (all of it, twice, if it is
        not plain), one block, and six (out, r) in float64.
        """
        chunks = min(2 * CHUNK_BYTES, self.weight_bytes) if self.is_plain else 2 * self.weight_bytes
        sides = self.out_features + self.in_features
        factor_values = min(self.rank * sides, self.out_features * self.in_features)  # a whole weight has no factors
        return chunks + BLOCK_BYTES + 8 * factor_values + 8 * 6 * self.lora_rank * sides

    @property
    def solved_bytes(self) -> int:
        """Bound its corrected factors, in float64."""
        return 8 * self.lora_rank * (self.out_features + self.in_features)


def correction_bytes(linears: Sequence[CorrectedShape]) -> int:
    """Bound what a correction holds: what is solved of all linears, and the fuller of two moments.

    Those are the linears that are worked on at once, and the float32 copies that are written at the end.
    """
    working = LINEARS_AT_ONCE * max((linear.working_bytes for linear in linears), default=0)
    solved = sum(linear.solved_bytes for linear in linears)
    return solved + max(working, solved // 2)
