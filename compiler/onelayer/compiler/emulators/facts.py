"""The format of an emulator: its `quantization_config`, and the names and shapes of its tensors. Torch-free."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from onelayer.compiler.codes.forms import (
    CODEBOOK_ROWS,
    ENTRY_BYTES,
    WINDOW_BITS,
    CodeBits,
    CodeShape,
    CodeWidth,
    code_row_bytes,
)
from onelayer.compiler.factors.stored_forms import FactorDtype, known_factor_dtype, row_bytes

UP, DOWN, DENSE, CODES, CODEBOOK = ".lr_up", ".lr_down", ".lr_dense", ".lr_codes", ".lr_codebook"
ENDINGS = (UP, DOWN, DENSE, CODES, CODEBOOK)


def stack_tensor(stack: str, ending: str) -> str:
    """Name a tensor that replaces a stack of experts: `experts.lr_up_gate_up_proj` for `experts.gate_up_proj`.

    Both are parameters of one module. No rule of transformers for the stack's own name matches this one.
    """
    path, _, leaf = stack.rpartition(".")
    return f"{path}{ending}_{leaf}"


# What `weights_file` may name: the one index that the writer makes, or the file of an emulator in a single one.
WeightsFile = Literal["emulator.safetensors.index.json", "emulator.safetensors"]


class StackFacts(BaseModel):
    """A compressed stack: (E, out, in) of the stack that was replaced, and the rank of its experts' factors.

    Without a rank, its matrices are quantized whole. With a code width, they are codes of so many bits, and the factors
    hold what the codes leave out.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    shape: tuple[int, int, int]
    rank: int | None
    code_width: CodeWidth | None = None
    code_bits: CodeBits = WINDOW_BITS

    @property
    def code_shape(self) -> CodeShape | None:
        """The shape of the codes, if there are any."""
        return None if self.code_width is None else CodeShape(self.code_width, self.code_bits)

    @property
    def full_rank(self) -> int:
        """The rank; for whole matrices, their full rank."""
        return min(self.shape[1:]) if self.rank is None else self.rank

    @model_validator(mode="after")
    def _codes_have_factors(self) -> Self:
        if self.code_width is not None and self.rank is None:
            raise ValueError("a coded stack needs the rank of its factors")
        return self


class EmulatorFacts(BaseModel):
    """The `quantization_config` of an emulator: the rank of every factorized module, and the original it replaces.

    If the factors are quantized, `shapes` holds (out, in) of every compressed module, modules in `quantized_dense` keep
    their whole weight, and all are used in `unpacked_dtype`. `stacks` are the compressed stacks of experts by the name
    of the parameter. `codes` are the code widths of modules whose weight is coded, in `code_bits` bits; those of them
    that are in `ranks` have residual factors too. An emulator with stacks has format version 2, one with codes of eight
    bits 3, with coded stacks 4, with codes of fewer bits 5; older readers refuse them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["onelayer"]
    format_version: Literal[1, 2, 3, 4, 5]
    ranks: dict[str, int]
    factor_dtype: str | None = None
    unpacked_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    shapes: dict[str, tuple[int, int]] = {}
    quantized_dense: tuple[str, ...] = ()
    codes: dict[str, CodeWidth] = {}
    code_bits: CodeBits = WINDOW_BITS
    stacks: dict[str, StackFacts] = {}
    base_model: str
    base_revision: str | None = None
    base_digest: str
    weights_file: WeightsFile | None = None

    @model_validator(mode="after")
    def _quantized_has_shapes(self) -> Self:
        named = {*self.ranks, *self.quantized_dense, *self.codes}
        if self.quantized_dtype is not None and (self.unpacked_dtype is None or not named <= self.shapes.keys()):
            raise ValueError(f"{self.factor_dtype} factors need unpacked_dtype and the shapes of all modules")
        if self.codes and self.quantized_dtype is None:
            raise ValueError("codes need a known factor_dtype")
        if self.quantized_dtype is None and any(
            stack.rank is None or stack.code_width is not None for stack in self.stacks.values()
        ):
            raise ValueError("a stack without a rank, or of codes, is quantized, in no known factor_dtype")
        return self

    @property
    def quantized_dtype(self) -> FactorDtype | None:
        """The dtype that factors are quantized to; None if they are plain tensors."""
        return known_factor_dtype(self.factor_dtype)

    @property
    def compressed(self) -> dict[str, int]:
        """The rank of every module without the original's weight; a quantized or coded weight has its full rank."""
        whole = (*self.quantized_dense, *self.codes)
        return {**self.ranks, **{name: min(self.shapes[name]) for name in whole}}

    def code_shape(self, module: str) -> CodeShape | None:
        """Return the shape of a module's codes, if it has any."""
        width = self.codes.get(module)
        return None if width is None else CodeShape(width, self.code_bits)

    def linear_sizes(self, module: str) -> dict[str, tuple[int | None, int | None]]:
        """Return the shapes of the tensors that replace a linear's weight, by the ending of their names.

        Plain factors do not tell the sides of the weight, which are None.
        """
        rank, factor_dtype = self.ranks.get(module), self.quantized_dtype
        if factor_dtype is None:
            return {UP: (None, rank), DOWN: (rank, None)}
        out_features, in_features = self.shapes[module]
        if module in self.quantized_dense:
            return {DENSE: (out_features, row_bytes(in_features, factor_dtype))}
        sizes: dict[str, tuple[int | None, int | None]] = {}
        if rank is not None:
            sizes = {
                UP: (rank, row_bytes(out_features, factor_dtype)),
                DOWN: (rank, row_bytes(in_features, factor_dtype)),
            }
        if (code := self.code_shape(module)) is not None:
            sizes[CODES] = (out_features, code_row_bytes(in_features, code))
            sizes[CODEBOOK] = (CODEBOOK_ROWS, ENTRY_BYTES * code.width)
        return sizes


def stack_sizes(facts: StackFacts, factor_dtype: FactorDtype | None) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the tensors that replace a stack, by the ending of their names."""
    count, out_features, in_features = facts.shape
    rank = facts.rank
    if rank is None:
        assert factor_dtype is not None
        return {DENSE: (count, out_features, row_bytes(in_features, factor_dtype))}
    if factor_dtype is None:
        return {UP: (count, out_features, rank), DOWN: (count, rank, in_features)}
    sizes = {
        UP: (count, rank, row_bytes(out_features, factor_dtype)),
        DOWN: (count, rank, row_bytes(in_features, factor_dtype)),
    }
    if (code := facts.code_shape) is not None:
        sizes[CODES] = (count, out_features, code_row_bytes(in_features, code))
        sizes[CODEBOOK] = (count, CODEBOOK_ROWS, ENTRY_BYTES * code.width)
    return sizes
