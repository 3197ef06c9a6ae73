"""The settings of a compile, checked."""

from dataclasses import dataclass
from typing import get_args

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.factorize import Solver
from onelayer.compiler.factors.ranks import Allocation
from onelayer.compiler.factors.stored_forms import FactorDtype


@dataclass(frozen=True)
class CompileSettings:
    """What a person chose, checked; everything here can change the emulator's bytes.

    `ratio` is the kept share of each linear's values; with a `factor_dtype` it may be 1, where all are kept, quantized.
    """

    ratio: float
    factor_dtype: FactorDtype | None
    samples: int
    max_length: int
    batch_size: int
    rank_allocation: Allocation
    solver: Solver
    seed: int

    def __post_init__(self) -> None:
        if not (0 < self.ratio < 1 or (self.ratio == 1 and self.factor_dtype is not None)):
            raise InputError(f"--ratio {self.ratio}: must lie between 0 and 1, for example 0.25")
        if min(self.samples, self.max_length, self.batch_size) < 1:
            raise InputError("--samples, --max-length and --batch-size must be at least 1")
        for option, value, known in (
            ("--solver", self.solver, get_args(Solver)),
            ("--rank-allocation", self.rank_allocation, get_args(Allocation)),
        ):
            if value not in known:
                raise InputError(f"{option} {value}: is none of {', '.join(known)}")
